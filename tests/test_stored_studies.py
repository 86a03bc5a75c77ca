"""Studies and adapters that earlier versions stored: compared and served, not continued."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner, Result
from stored import unpack_store

from adaptive_lora import __version__
from adaptive_lora.cli import main
from adaptive_lora.tracking.create import upgrade

STUDY = "stored-502d4d4777"
SETTINGS = (
    "--study", "stored", "--seeds", "0,1", "--lr", "1e-2", "--max-steps", "4",
    "--max-examples", "60", "--precision", "fp32",
)  # fmt: skip
"""The command that wrote the store, without methods."""


@pytest.fixture
def store(tmp_path: Path) -> str:
    uri = unpack_store("0_1", tmp_path / "store")
    upgrade(uri)  # as users do where MLflow has become newer
    return uri


def run(store: str, *words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--tracking-uri", store], catch_exceptions=False)


def test_a_stored_study_is_compared_under_the_policy_that_it_had(store: str) -> None:
    result = run(store, "compare", "--study-id", STUDY, "--output", "out")
    assert result.exit_code == 0, result.output
    (found,) = Path("out").glob("*/comparison.json")
    comparison = json.loads(found.read_text(encoding="utf-8"))
    labels = [method["label"] for method in comparison["methods"]]
    assert labels == ["uniform-r1", "linear_decay-r2-1", "uniform-r1-standard"]
    assert comparison["facts"]["scaling"] == "constant, alpha 32.0"
    (audit,) = [entry for entry in comparison["audit"] if entry["topic"] == "scaling"]
    assert audit["kind"] == "bad"
    assert "linear_decay-r2-1: 2 to 4" in audit["text"]  # factor 2 at ranks 1 and 2
    assert "uniform-r1-standard: 32" in audit["text"]


def test_a_stored_study_is_not_continued(store: str) -> None:
    result = run(store, "study", "--methods", "uniform:rank=1", *SETTINGS)
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert f"study {STUDY} was begun by adaptive-lora 0.1.0 with scaling constant" in text
    assert f"(trial signatures of version 2). This is {__version__} with scaling standard (version 3)" in text
    assert mlflow.MlflowClient(store).search_runs(["1"], "tags.study_id != 'stored-502d4d4777'") == []


def test_its_own_policy_is_not_continued_either_and_another_name_begins_anew(store: str) -> None:
    words = ("--methods", "uniform:rank=1", "--scaling", "constant", *SETTINGS)
    assert run(store, "study", *words).exit_code == 2
    again = run(store, "study", *words, "--study", "anew", "--seeds", "0")
    assert again.exit_code == 0, again.output
    # the same numbers as then: only the name of the policy has changed
    losses = {
        (run.data.tags["study_id"].split("-")[0]): run.data.metrics["test/loss"]
        for run in mlflow.MlflowClient(store).search_runs(["1"], "tags.method = 'uniform-r1' and tags.seed = '0'")
    }
    assert losses["anew"] == pytest.approx(losses["stored"], rel=1e-5)


def test_policies_are_not_mixed_in_silence(store: str) -> None:
    assert run(store, "study", "--methods", "uniform:rank=1", *SETTINGS, "--study", "new").exit_code == 0
    query = ("compare", "--query", "tags.method = 'uniform-r1'", "--baseline", "uniform-r1")
    result = run(store, *query)
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert "scaling differs: alpha 32.0, scaling" in text
    assert "constant" in text
    assert "standard" in text
    # named in the label, two policies are what is compared
    named = run(store, "study", "--methods", "uniform:rank=1 uniform:rank=1,scaling=constant",
                *SETTINGS, "--study", "new")  # fmt: skip
    assert named.exit_code == 0, named.output


def test_a_registered_adapter_is_still_served(store: str) -> None:
    mlflow.set_tracking_uri(store)
    mlflow.set_registry_uri(store)
    adapter = mlflow.pyfunc.load_model("models:/adaptive-lora@champion")
    (answer,) = adapter.predict([{"instruction": "Say in Velu: the cat found the horse"}])
    assert isinstance(answer, str)
