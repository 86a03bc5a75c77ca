"""Adapters as MLflow models: nothing pickled, proven before they are registered, served as text."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow.entities import Run
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tracked import Finished
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive_lora.cli import main
from adaptive_lora.config import TrackingConfig
from adaptive_lora.errors import AdapterError, TrackingError
from adaptive_lora.runner.comparison_input import Selection
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.result import StudyResult, prove
from adaptive_lora.runner.run import compare_study
from adaptive_lora.runner.trial import PROBE, probe_logits
from adaptive_lora.serving import BASE_VARIABLE, load_adapter
from adaptive_lora.tracking import connect, read_trials
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder

CHAMPION = "models:/adaptive-lora@champion"


@pytest.fixture(autouse=True)
def _in_the_study(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where the study is, with pickle forbidden."""
    monkeypatch.chdir(finished.folder)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    connect(TrackingConfig())


@pytest.fixture(scope="module")
def context(finished: Finished) -> StudyContext:
    """The workbench of the finished study."""
    return StudyContext(finished.config)


def winner(finished: Finished) -> Run:
    """Return the run of the champion."""
    found = finished.client.get_model_version_by_alias("adaptive-lora", "champion")
    return finished.client.get_run(found.run_id)


def test_every_trial_is_a_model_from_code_without_pickle(finished: Finished) -> None:
    assert len(finished.children) == 4
    for run in finished.children:
        folder = adapter_folder(run.data.tags[MODEL_TAG]).parents[1]
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
        assert {"adapter_config.json", "adapter_model.safetensors", "rank_plan.json"} <= names
        described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
        flavour = described["flavors"]["python_function"]
        assert flavour["loader_module"] == "mlflow.pyfunc.loaders.code_model"
        assert "python_model" not in flavour
        assert described["metadata"]["base_hash"] == run.data.tags["base_hash"]
        lines = (folder / "requirements.txt").read_text(encoding="utf-8").split()
        pinned = dict(line.split("==") for line in lines)
        assert set(pinned) == {"mlflow", "torch", "transformers", "peft", "safetensors", "pandas"}
        assert pinned["peft"] == version("peft")
        assert "+" not in pinned["torch"]  # local builds are on no package index
        record = json.loads((adapter_folder(run.data.tags[MODEL_TAG]) / "adaptive_lora.json").read_text())
        assert record["base"]["content_hash"] == run.data.tags["base_hash"]


def test_champion_generates_text() -> None:
    model = mlflow.pyfunc.load_model(CHAMPION)
    rows = pd.DataFrame({"instruction": ["Swap 1", "Swap 2"], "input": ["red blue", None]})
    answers = model.predict(rows, params={"max_new_tokens": 5})
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)
    served = model.unwrap_python_model()
    _, tokenizer, record = served.loaded
    prompt = record["template"]["with_input"].replace("{prompt}", "Swap 1")
    verbatim = pd.DataFrame({"prompt": [prompt.replace("{input}", "red blue")]})
    assert model.predict(verbatim, params={"max_new_tokens": 5}) == answers[:1]
    long = model.predict(verbatim)[0]
    assert 5 < len(tokenizer(long)["input_ids"]) <= 64
    with pytest.raises(ValueError, match="required one of the columns prompt, instruct"):
        model.predict(pd.DataFrame({"input": ["red blue"]}))


def test_champion_has_the_decision_as_tags(finished: Finished) -> None:
    found = finished.client.get_model_version_by_alias("adaptive-lora", "champion")
    study_result = finished.outcome.study_result
    assert study_result.champion is not None
    assert str(found.version) == study_result.champion.version
    run = finished.client.get_run(found.run_id)
    tags = found.tags
    assert tags["method"] == run.data.tags["method"] == study_result.comparison.winner
    assert tags["study_id"] == study_result.study_id
    assert tags["decided_by_run"] == finished.parent.info.run_id
    assert tags["n_seeds"] == "2"
    assert tags["headline"] == study_result.comparison.headline
    assert tags["decision"] == study_result.comparison.decision
    assert {"p_value", "p_value_corrected", "verdict", "baseline", "decided_at"} <= set(tags)
    assert f"**{tags['method']}**" in found.description
    assert tags["decision"] in found.description
    assert tags["reload_max_logit_difference"] == "0.0"
    assert tags["reload_max_loss_difference"] == "0.0"


def test_every_adapter_reloads_exactly_in_fp32(finished: Finished, context: StudyContext) -> None:
    assert context.runtime.precision == "fp32"
    for record in read_trials(finished.outcome.store, finished.children):
        run = finished.client.get_run(record.run_id)
        proof = prove(context, record, run.data.tags[MODEL_TAG])
        assert proof.max_logit_difference == proof.max_loss_difference == 0.0
        assert proof.test_loss == run.data.metrics["test/loss"]


def test_stock_peft_loads_the_adapter(finished: Finished, context: StudyContext, base_folder: Path) -> None:
    folder = adapter_folder(CHAMPION)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    assert torch.equal(probe_logits(context, model, 0), load_file(folder / PROBE)["logits"])
    frozen = probe_logits(context, context.base.model, 0)
    assert not torch.equal(frozen, load_file(folder / PROBE)["logits"])


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Replace a file's content inside the block."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def compare_into(name: str) -> StudyResult:
    """Compare the study again with another name in the registry."""
    changes = {"registered_model": name, "output": f"report-{name}"}
    study_result, _ = compare_study(TrackingConfig(), Selection(), changes, Console(file=io.StringIO()))
    return study_result


@pytest.mark.parametrize("how", ["weights", "truncated", "probe gone"])
def test_a_tampered_adapter_is_not_registered(
    finished: Finished, context: StudyContext, tmp_path: Path, how: str
) -> None:
    run = winner(finished)
    folder = adapter_folder(run.data.tags[MODEL_TAG])
    path = folder / (PROBE if how == "probe gone" else "adapter_model.safetensors")
    if how == "weights":
        weights = load_file(path)
        name = next(name for name in weights if "lora_B" in name)
        weights[name][0, 0] += 1e-3
        save_file(weights, tmp_path / "changed.safetensors", metadata={"format": "pt"})
        content, words = ((tmp_path / "changed.safetensors").read_bytes(), "does not reload as it was")
    else:
        content, words = (path.read_bytes()[: 10 if how == "truncated" else 0], "cannot be loaded back")
    (record,) = read_trials(finished.outcome.store, [run])
    with changed(path, content):
        with pytest.raises(AdapterError, match=words):
            prove(context, record, run.data.tags[MODEL_TAG])
        if how == "weights":
            study_result = compare_into("tampered")
            assert study_result.champion is None
            assert "It was not registered" in study_result.no_champion
    names = [model.name for model in finished.client.search_registered_models()]
    assert names == ["adaptive-lora"]
    prove(context, record, run.data.tags[MODEL_TAG])  # and untouched again, it is accepted


def test_an_adapter_that_another_version_logged_is_refused_with_what_to_do(finished: Finished) -> None:
    code = adapter_folder(winner(finished).data.tags[MODEL_TAG]).parents[1] / "code" / "adapter_serving"
    with ExitStack() as stack:
        for name in ("answers", "base", "tasks", "text", "tokens"):
            path = code / f"{name}.py"
            stack.enter_context(changed(path, path.read_bytes() + b"# as it was then"))
        study_result = compare_into("earlier")
    assert study_result.champion is None
    files = ", ".join(f"code/adapter_serving/{name}.py" for name in ("answers", "base", "tasks"))
    assert f"not this version's ({files} and 2 more files): another version" in study_result.no_champion
    assert "new study, --study NAME). It was not registered." in study_result.no_champion


@pytest.fixture
def other_base(base_folder: Path, tmp_path: Path) -> Path:
    """The base with one weight changed."""
    folder = tmp_path / "other"
    shutil.copytree(base_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][0, 0] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_changed_base_is_an_error(finished: Finished, other_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE_VARIABLE, str(other_base))
    with pytest.raises(RuntimeError, match=r"has content hash .* was trained on"):
        mlflow.pyfunc.load_model(CHAMPION)
    words = ["evaluate", "--adapter", CHAMPION, "--data", finished.config.data.data]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "was trained on" in result.output


def test_evaluate_gives_the_test_loss_again(
    finished: Finished, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, tmp_path / "copy")
    monkeypatch.setenv(BASE_VARIABLE, str(tmp_path / "copy"))
    words = ["evaluate", "--adapter", CHAMPION, "--data", finished.config.data.data]
    words += ["--max-tokens", "120", "--template", "compact", "--experiment", "evaluations", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["test/loss"] == winner(finished).data.metrics["test/loss"]


@pytest.mark.parametrize("uri", ["models:/nobody@champion", "models:/adaptive-lora/99", "models:/x y"])
def test_an_unknown_model_is_an_error(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"cannot be fetched|names no model"):
        adapter_folder(uri)


def test_a_model_of_others_is_an_error(finished: Finished) -> None:
    result = CliRunner().invoke(main, ["evaluate", "--adapter", f"runs:/{finished.parent.info.run_id}/report"])
    assert result.exit_code == 2
    assert "holds no adapter" in result.output


def test_mlflows_transformers_flavour_loses_the_adapter(
    finished: Finished, context: StudyContext, base_folder: Path, tmp_path: Path
) -> None:
    """MLflow issue 23761: why adapters are not logged with `mlflow.transformers`.

    When this fails, MLflow has mended it.
    """
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.name_or_path = model.base_model.model.name_or_path = str(base_folder)
    trained = probe_logits(context, model, 0)
    parts: dict[str, Any] = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(base_folder)}
    saved = tmp_path / "flavour"
    mlflow.transformers.save_model(parts, str(saved), task="text-generation", pip_requirements=["transformers", "peft"])
    theirs = mlflow.transformers.load_model(str(saved), return_type="components")["model"].eval()
    for logits in (trained, probe_logits(context, context.base.model, 0)):  # not even the base's own
        assert not torch.allclose(probe_logits(context, theirs, 0), logits, atol=1e-2)

    model.save_pretrained(str(tmp_path / "ours"), save_embedding_layers=False)
    shutil.copy(adapter_folder(CHAMPION) / "adaptive_lora.json", tmp_path / "ours")
    ours, _, _ = load_adapter(tmp_path / "ours")
    assert torch.equal(probe_logits(context, ours, 0), trained)
