"""Files that a study wrote and somebody changed: a clear word, and nothing done as they say."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from click.testing import CliRunner
from mlflow.entities import Run
from test_bad_inputs import require_refusal
from test_checkpoints import EVERY_STEP, NEVER, SETTINGS, numbers, signal_at_forward
from tracked import Finished, store_in

from adaptive_lora.cli import main
from adaptive_lora.errors import AdapterError
from adaptive_lora.interruption import Interrupted, interruptible
from adaptive_lora.runner.comparison_input import comparison_input_of
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.tracking import StudyRun
from adaptive_lora.tracking.journal import RECORDS, CorruptJournal, Journal, read_record
from adaptive_lora.training import TrialCheckpoints
from adaptive_lora.training.checkpoint_files import CorruptCheckpoint, read_checkpoint, write_checkpoint
from adaptive_lora.training.state import is_snapshot

Values = dict[str, Any]
BaseContext = Callable[..., StudyContext]


def _set(*path: str | int, to: object) -> Callable[[str], str]:
    """Return a function that changes one value in a JSON text."""

    def change(text: str) -> str:
        values = inner = json.loads(text)
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = to
        return json.dumps(values)

    return change


def _whole(text: str) -> Callable[[str], str]:
    return lambda _: text


TRIAL: dict[str, tuple[str, Callable[[str], str]]] = {
    "an empty result": ("trial.json", _whole("")),
    "a result that is a list": ("trial.json", _whole("[]")),
    "a result nested without end": ("trial.json", _whole('{"a":' * 50_000)),
    "a result without scores": ("trial.json", _set("test", to=None)),
    "a loss of text": ("trial.json", _set("test", "nll", 0, to="<script>")),
    "a loss beyond floats": ("trial.json", _set("test", "nll", 0, to=10**400)),
    "a loss too few": ("trial.json", _set("test", "nll", to=[1.0])),
    "losses of losses": ("trial.json", _set("test", "nll", 0, to=[[1.0]])),
    "negative tokens": ("trial.json", _set("test", "tokens", 0, to=-1)),
    "tokens in part": ("trial.json", _set("test", "tokens", 0, to=1.5)),
    "ids that are none": ("trial.json", _set("test", "example_ids", 0, to=None)),
    "a score of text": ("trial.json", _set("test", "overall", to={"F1": "<b>"})),
    "a validation loss of text": ("trial.json", _set("validation_loss", to="low")),
    "a step beyond numbers": ("trial.json", _set("validation_curve", 0, to=[10**30, 1.0])),
    "tokens beyond numbers": ("trial.json", _set("validation_tokens", 0, to=10**30)),
    "a plan that is a list": ("rank_plan.json", _whole("[]")),
    "a plan of no sites": ("rank_plan.json", _set("sites", to=None)),
    "a rank of text": ("rank_plan.json", _set("sites", 0, "rank", to="<script>")),
    "another rank": ("rank_plan.json", _set("sites", 0, "rank", to=7)),
    "other parameters": ("rank_plan.json", _set("trainable_parameters", to=1)),
    "a role of Python": ("rank_plan.json", _set("sites", 0, "role", to="__class__")),
    "a certificate of text": ("rank_plan.json", _set("certificate", to="sure")),
    "a budget beyond numbers": ("rank_plan.json", _set("budget", to=float("inf"))),
}  # fmt: skip
STUDY: dict[str, tuple[str, Callable[[str], str]]] = {
    "no settings": ("study.json", _whole("")),
    "settings of nothing": ("study.json", _whole("null")),
    "methods of numbers": ("study.json", _set("methods", to=[1])),
    "no methods": ("study.json", _set("methods", to=[])),
    "seeds of text": ("study.json", _set("seeds", to="0 1")),
    "rates of objects": ("study.json", _set("lr", 0, to={})),
    "base scores of text": ("frozen.json", _whole('"low"')),
    "base scores of NaN": ("frozen.json", _set("0", "nll", 0, to=float("nan"))),
    "a fold that is none": ("frozen.json", _set("a", to={})),
    "examples that are a list": ("examples.json", _whole('["a"]')),
    "examples of numbers": ("examples.json", _whole('{"a": 1}')),
}  # fmt: skip


def _file(run: Run, name: str) -> Path:
    return Path(urlparse(run.info.artifact_uri).path) / name


@pytest.fixture
def changed(finished: Finished, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Change a file of the finished study's trial or of the study itself; give the file's name."""
    monkeypatch.chdir(finished.folder)
    run = finished.children[0] if request.param in TRIAL else finished.parent
    name, change = {**TRIAL, **STUDY}[request.param]
    path = _file(run, name)
    original = path.read_text(encoding="utf-8")
    path.write_text(change(original), encoding="utf-8")
    yield name
    path.write_text(original, encoding="utf-8")


@pytest.mark.parametrize("changed", [*TRIAL, *STUDY], indirect=True)
def test_changed_artifacts_are_refused(changed: str, finished: Finished) -> None:
    result = CliRunner().invoke(main, ["compare"])
    says = "cannot be read" if changed in ("trial.json", "rank_plan.json") else changed
    require_refusal(result, says)


def test_what_is_unchanged_is_read(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    comparison_input = comparison_input_of(StudyRun.find(finished.outcome.store, None))
    for record in comparison_input.records:
        run = finished.client.get_run(record.run_id)
        assert record.plan == json.loads(_file(run, "rank_plan.json").read_text(encoding="utf-8"))
    assert comparison_input.base_scores is not None
    assert comparison_input.examples


@pytest.mark.parametrize(("tag", "value"), [("seed", "<b>0</b>"), ("lr", "fast"), ("fold", "")])
def test_changed_tags_are_refused(finished: Finished, monkeypatch: pytest.MonkeyPatch, tag: str, value: str) -> None:
    monkeypatch.chdir(finished.folder)
    run = finished.children[0]
    finished.client.set_tag(run.info.run_id, tag, value)
    try:
        require_refusal(CliRunner().invoke(main, ["compare"]), "has no tags of a trial any more")
    finally:
        finished.client.set_tag(run.info.run_id, tag, run.data.tags[tag])


def _rewritten(folder: Path, **changes: object) -> None:
    """Change a checkpoint's values, with digests that fit."""
    write_checkpoint(folder, {**read_checkpoint(folder), **changes})


EMPTY = {"losses": [], "step_tokens": [], "reported": 0, "validation": []}


@pytest.mark.parametrize(
    "value",
    [
        None, [], {}, {**EMPTY, "reported": 1}, {**EMPTY, "reported": -1},
        {**EMPTY, "losses": ["low"]}, {**EMPTY, "validation": [1]}, {**EMPTY, "step_tokens": None},
        {**EMPTY, "reported": "0"},
    ],
)  # fmt: skip
def test_what_is_read_of_a_checkpoint_is_what_it_should_be(value: object) -> None:
    assert is_snapshot(EMPTY)
    assert not is_snapshot(value)


def test_changed_checkpoints_are_left_out_or_refused(
    make_bench: BaseContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_bench(methods="uniform:rank=2", **SETTINGS)
    (trial,) = context.config.trials()
    kept = tmp_path / "kept"
    with signal_at_forward(context, 3, signal.SIGTERM), interruptible(), pytest.raises(Interrupted):
        run_trial(context, trial, tmp_path / "a", checkpoints=TrialCheckpoints(kept, EVERY_STEP))
    (folder,) = kept.glob("training1-*")
    good = read_checkpoint(folder)["snapshot"]
    one = next(iter(good["weights"]))
    for change in (
        {"weights": {}}, {"weights": {**good["weights"], one: torch.zeros(1, 1, 1)}},
        {"optimizer": {"state": {}, "param_groups": []}}, {"scheduler": 7}, {"random": {}},
        {"batches_drawn": 10**12},
    ):  # fmt: skip
        _rewritten(folder, snapshot={**good, **change})
        with pytest.raises(AdapterError, match="does not fit its training"):
            run_trial(context, trial, tmp_path / "b", checkpoints=TrialCheckpoints(kept, NEVER))
    _rewritten(folder, snapshot=good, seconds=-1.0)
    with caplog.at_level(logging.WARNING):
        again = run_trial(context, trial, tmp_path / "c", checkpoints=TrialCheckpoints(kept, NEVER))
    assert "was changed after it was written and is ignored" in caplog.text
    assert numbers(again) == numbers(run_trial(context, trial, tmp_path / "whole"))


def test_a_checkpoint_names_its_own_files_and_known_devices(tmp_path: Path) -> None:
    folder, outside = tmp_path / "one", tmp_path / "outside"
    write_checkpoint(folder, {"weights": torch.arange(3.0)})
    outside.write_text("not for reading", encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for names in ({}, {**manifest["sha256"], "../outside": "0" * 64}, ["../outside"]):
        text = json.dumps({**manifest, "sha256": names})
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        with pytest.raises(CorruptCheckpoint):
            read_checkpoint(folder)

    def say(state: str) -> None:
        import hashlib

        (folder / "state.json").write_text(state, encoding="utf-8")
        digests = {**manifest["sha256"], "state.json": hashlib.sha256(state.encode()).hexdigest()}
        text = json.dumps({**manifest, "sha256": digests})
        (folder / "manifest.json").write_text(text, encoding="utf-8")

    say('{"map": [["weights", {"tensor": ["0", "meta"]}]]}')
    assert read_checkpoint(folder)["weights"].device.type == "cpu"
    for state in ('{"map":' * 50_000, "7", '{"map": [[{"list": []}, 1]]}', '{"tensor": ["9", 0]}',
                  '{"a": 1, "b": 2}'):  # fmt: skip
        say(state)
        with pytest.raises(CorruptCheckpoint):
            read_checkpoint(folder)


HELD = "files/" + "0" * 32
LINES: dict[str, Values | str] = {
    "a folder upwards": {"op": "artifacts", "held": "../../precious", "path": None},
    "a folder from the root": {"op": "model", "held": "/etc"},
    "a folder of another name": {"op": "artifacts", "held": "files", "path": None},
    "no folder": {"op": "artifacts", "path": None},
    "a method of Python": {"op": "__init__"},
    "no operation": {"values": {}},
    "a list": "[]",
    "nested without end": '{"op":' * 50_000,
    "tags of numbers": {"op": "tags", "values": {"a": 1}},
    "a metric of text": {"op": "metric", "k": "a", "v": "high", "s": 0, "t": 0},
    "a step beyond numbers": {"op": "metric", "k": "a", "v": 1.0, "s": 10**30, "t": 0},
    "other data": {"op": "data", "dataset": {"name": "a", "__class__": "b"}},
    "an end of numbers": {"op": "status", "status": 3, "time": 0},
    "a second run of nothing": {"op": "run", "key": "a"},
}


def _journal(outbox: Path, store: str, *lines: Values | str) -> Path:
    """Leave a journal behind whose lines somebody else wrote."""
    header = {
        "store": store, "experiment_id": "0", "name": "a", "tags": {}, "time": 1, "key": "a",
        "ends": True, "once": True,
    }  # fmt: skip
    journal = Journal.create(outbox, "one", header)
    journal.release()
    with (journal.folder / RECORDS).open("a", encoding="utf-8") as file:
        file.writelines(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return journal.folder


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_of_a_journal_is_as_written_or_refused(line: Values | str, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(CorruptJournal, match="is corrupt"):
        read_record(text.encode(), 0, tmp_path / RECORDS)


def test_a_journal_of_others_sends_and_deletes_only_its_own(own_store: str, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "precious"
    precious.mkdir(parents=True)
    (precious / "key").write_text("private", encoding="utf-8")
    outbox = tmp_path / "out" / "spool"
    folder = _journal(outbox, own_store, {"op": "artifacts", "held": "../../precious", "path": None})
    link = _journal(tmp_path / "linked", own_store, {"op": "artifacts", "held": HELD, "path": None})
    (link / HELD).mkdir(parents=True)
    (link / HELD / "plan.json").symlink_to(precious / "key")
    shutil.copytree(link, outbox / "two", symlinks=True)
    for facts in ({"facts": []}, {"delivered": "all"}, ["facts"]):
        other = shutil.copytree(folder, outbox / "three", dirs_exist_ok=True)
        (other / "delivered.jsonl").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        result = CliRunner().invoke(main, ["sync", "out", "--tracking-uri", own_store])
        assert result.exit_code == 3, (result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        assert result.output.count("is corrupt") == 2
        assert "plan.json is a link" in result.output
        assert "3 journals, 3 left" in result.output
    assert (precious / "key").read_text(encoding="utf-8") == "private"
    sent = [path for path in tmp_path.rglob("mlruns/**/plan.json")]
    assert not sent
    assert (outbox / "two" / HELD / "plan.json").is_symlink()


def test_where_files_go_is_asked_of_the_store(own_store: str, tmp_path: Path) -> None:
    outbox = tmp_path / "out" / "spool"
    folder = _journal(outbox, own_store, {"op": "artifacts", "held": HELD, "path": None})
    (folder / HELD).mkdir(parents=True)
    (folder / HELD / "plan.json").write_text("{}", encoding="utf-8")
    elsewhere = {"facts": {"artifact_uri": (tmp_path / "elsewhere").as_uri()}}
    (folder / "delivered.jsonl").write_text(json.dumps(elsewhere) + "\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["sync", "out", "--tracking-uri", store_in(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert not (tmp_path / "elsewhere").exists()
