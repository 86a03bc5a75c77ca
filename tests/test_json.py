"""One JSON document per command, its schema, and the schema of the study file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from bad_inputs.studies import _FILES
from click.testing import CliRunner
from documents import require_schema
from test_cli import flags
from tracked import Finished

from adaptive_lora.allocation import METHODS
from adaptive_lora.cli import doctor, machine, main
from adaptive_lora.cli.documents import DOCUMENTS, document_schema, print_document, schema_id
from adaptive_lora.cli.schema import study_file_schema
from adaptive_lora.cli.shapes import CellShape, JournalShape, PushedShape, TransferShape
from adaptive_lora.config import StudyConfig, load_study
from adaptive_lora.config.text_files import parse_yaml
from adaptive_lora.errors import AdaptiveLoraError

ROOT = Path(__file__).resolve().parents[1]


def printed(name: str, *words: object, code: int = 0) -> Any:
    """Return the document on a command's standard output, which follows its schema and is all there is."""
    result = CliRunner().invoke(main, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.stderr
    document = json.loads(result.stdout)
    require_schema(name, document)
    return document


def test_every_command_has_a_document() -> None:
    assert set(DOCUMENTS) == {*main.commands, "error"} - {"schema"}
    for command in main.commands.values():
        assert "--json" in {name for param in command.params for name in param.opts}
    for name in DOCUMENTS:
        assert document_schema(name)["title"] == schema_id(name)


def test_the_page_lists_every_document() -> None:
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    table = "".join(f"| `{name}` | {document.about} |\n" for name, document in sorted(DOCUMENTS.items()))
    assert table in page


def test_the_result_of_a_study(finished: Finished) -> None:
    values = finished.outcome.study_result.to_dict()
    document = json.loads(json.dumps({"schema": schema_id("compare"), **values}, allow_nan=False))
    require_schema("compare", document)
    require_schema("study", {**document, "schema": schema_id("study"), "trials_run": finished.outcome.trials_run})


def test_commands_on_a_store(own_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed("sync", "sync", "--tracking-uri", own_store)["journals"] == []
    says = printed("error", "sync", "no-such-folder", "--tracking-uri", own_store, code=2)["error"]["message"]
    assert says == "folder no-such-folder does not exist; required the output folder of a study."
    assert printed("upgrade-store", "upgrade-store", "--tracking-uri", own_store)["upgraded"] is False
    started: list[Any] = []
    monkeypatch.setattr(machine.os, "execv", lambda *words: started.append(words))
    monkeypatch.setattr(machine.os, "dup2", lambda *files: started.append(files))
    assert printed("ui", "ui", "--tracking-uri", own_store)["url"].startswith("http://127.0.0.1:5000/")
    assert started[0] == (2, 1)  # what the server prints is no document


@pytest.mark.long
def test_a_studys_commands_print_one_document_each(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    config = in_store(methods="uniform:rank=2 uniform:rank=1", seeds="0 1", max_steps=1)
    given = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in config.flat().items()
        if value not in (None, [])
    }
    study = printed("study", "study", *flags(given))
    assert study["trials_run"] == 4
    place = ("--tracking-uri", config.tracking.tracking_uri)
    compared = printed("compare", "compare", *place, "--output", tmp_path / "out")
    assert compared["methods"] == study["methods"]
    found = printed("power", "power", "--study-id", "latest", "--gain-percent", 1, *place)
    assert found["question"]["source"].startswith("observed in")
    one = flags({k: v for k, v in given.items() if k not in ("methods", "seeds", "baseline", "race")})
    trained = printed("train", "train", *one, "--method", "uniform:rank=2", "--adapter", "adapter")
    assert (trained["trained"], trained["study_id"]) == (False, study["study_id"])
    scored = {k: v for k, v in given.items() if k not in ("methods", "seeds", "lr", "baseline", "model", "revision")}
    scores = printed("evaluate", "evaluate", *flags(scored), "--adapter", "adapter")
    assert scores["test/loss"] == pytest.approx(trained["metrics"]["test/loss"])
    champion = f"models:/{study['champion']['name']}@champion"
    assert printed("export", "export", champion, "served", "--uniform", *place)["rank"] == 8  # vLLM's least


def test_plans_and_profiles(base_folder: Path, data_file: Path) -> None:
    model = ("--model", base_folder)
    assert len(printed("plan", "plan", *model, "--method", "uniform")["sites"]) == 12
    assert printed("plan", "plan", *model, "--method", "prefix_tuning")["family"]
    emitted = printed("plan", "plan", *model, "--emit", "unsloth")["emitted"]
    assert (emitted["form"], json.loads(emitted["text"])["r"]) == ("unsloth", 16)
    data = ("--data", data_file, "--template", "compact", "--profile-batches", 2, "--profile-batch-size", 2)
    profile = printed("profile", "profile", *model, *data, "--metric", "whitened_gradient")
    Path("profile.json").write_text(json.dumps(profile), encoding="utf-8")
    plan = printed(
        "plan", "plan", *model, "--method", "waterfill", "--budget", "uniform-2", "--profile", "profile.json"
    )
    assert plan["certificate"]["best"] > 0
    printed("power", "power", "--difference", 0.1, "--spread", 0.1)


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["plan", "--method", "unifrom"], "ConfigError", "did you mean 'uniform'"),
        (["plan", "--nosuch"], "UsageError", "--nosuch"),
        (["studdy"], "UsageError", "studdy"),
        (["plan", "--model", "x" * 300], "ConfigError", "too long"),
        (["compare", "--tracking-uri", "sqlite:///none.db"], "TrackingError", "no tracking store"),
    ],
)
def test_an_error_is_a_document(words: list[str], kind: str, says: str) -> None:
    result = CliRunner().invoke(main, [*words, "--json"])
    document = json.loads(result.stdout)
    require_schema("error", document)
    assert (document["error"]["type"], document["error"]["exit_code"], result.exit_code) == (kind, 2, 2)
    assert says in document["error"]["message"]
    assert says in result.stderr


def test_nothing_but_the_document_reaches_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(config: StudyConfig) -> list[doctor.Finding]:
        print("of a library")
        return [doctor.ok("python", "3")]

    def stopped(config: StudyConfig) -> list[doctor.Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", noisy)
    printed("doctor", "doctor")
    assert CliRunner().invoke(main, ["doctor", "--json"]).stderr == "of a library\n"
    monkeypatch.setattr(doctor, "diagnose", stopped)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(result.stdout)["error"]["type"] == "Interrupted"
    assert result.exit_code == 130


def test_a_document_has_no_nan() -> None:
    with click.Context(main) as ctx, ctx.scope(), pytest.raises(ValueError, match="JSON compliant"):
        print_document("power", {"x": float("nan")})


def test_shapes_of_what_needs_torch_have_its_fields() -> None:
    from adaptive_lora.runner.hub import Pushed
    from adaptive_lora.runner.transfer import TransferCell, TransferTable
    from adaptive_lora.tracking.sync import Synced

    pairs = ((CellShape, TransferCell), (TransferShape, TransferTable), (JournalShape, Synced), (PushedShape, Pushed))
    for shape, kind in pairs:
        assert list(shape.__annotations__) == [field.name for field in dataclasses.fields(kind)]


@pytest.fixture(scope="module")
def check() -> Any:
    """Validator of study files."""
    jsonschema.Draft202012Validator.check_schema(study_file_schema())
    return jsonschema.Draft202012Validator(study_file_schema())


def test_study_files_follow_the_schema(check: Any) -> None:
    files = sorted((ROOT / "entrypoints" / "studies").glob("*.yaml"))
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        for values in (yaml.safe_load(text), parse_yaml(text)[0]):  # as editors read it, and as studies do
            assert [error.message for error in check.iter_errors(values)] == [], path
    settings = StudyConfig().flat()
    assert [error.message for error in check.iter_errors(settings)] == []
    assert set(check.schema["properties"]) == {*settings, "scale", "scale_policy", "claim_minutes"}


BEYOND = {
    "an unknown storage", "a storage without folder", "a storage that takes no files",
    "both names", "a number beyond floats", "a whole number beyond floats", "a seed twice", "a method twice",
    "an unknown baseline", "shares without rest", "a set as value", "bytes as value", "NaN", "infinity",
    "a setting twice", "UTF-16",
}  # fmt: skip
"""Wrong study files that no schema refuses: they depend on several settings, or JSON has no such values."""


def test_wrong_study_files_break_the_schema(check: Any) -> None:
    passed = set()
    for name, (content, _) in _FILES.items():
        try:
            values = yaml.safe_load(content) if len(content) < 1000 else {"": None}
        except (yaml.YAMLError, ValueError, UnicodeDecodeError):
            continue  # no YAML, so that an editor says so without a schema
        if check.is_valid(values):
            passed.add(name)
    assert passed <= BEYOND, passed - BEYOND


@pytest.mark.parametrize("text", [
    "seeds: 0,1 2", "seeds: 3", "lr: 1e-4,3e-4", "lr: [1e-3, '2e-3']", "generate: off", "race: yes", "max_memory: 6GiB",
    "methods: uniform:rank=4 waterfill:rank=8", "methods: ['random:of=waterfill,rank=2']", "max_steps: none",
    "max_steps: null", "revision: 1.10", "study: 2024", "epochs: .5", "scale: 2",
])  # fmt: skip
def test_what_the_reader_takes_the_schema_takes(text: str, tmp_path: Path, check: Any) -> None:
    (tmp_path / "study.yaml").write_text(text if "lr" in text else f"{text}\nlr: [1e-3, 2e-3]", encoding="utf-8")
    load_study(tmp_path / "study.yaml", {})
    assert check.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text", ["methods: unifrom", "methods: ['uniform:rnk=2']", "methods: 'uniform: rank'", "lr: fast"]
)
def test_what_the_reader_refuses_the_schema_refuses(text: str, tmp_path: Path, check: Any) -> None:
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(AdaptiveLoraError):
        load_study(tmp_path / "study.yaml", {})
    assert not check.is_valid(yaml.safe_load(text))


def test_the_schema_is_printed_without_torch() -> None:
    code = (
        "import sys\nfrom adaptive_lora.cli import main\n"
        "try: main(['schema'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    names = json.loads(done.stdout)["properties"]["methods"]["anyOf"][0]["items"]["anyOf"][0]["enum"]
    assert names == list(METHODS)
    for words in (["schema", "plan"], ["schema", "plan", "--json"]):
        assert json.loads(CliRunner().invoke(main, words).stdout)["title"] == "adaptive-lora/plan/1"
