"""What a study meets in the world: signals, other processes, full disks, changed files, NaN."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import rows
from servers import SmallDisk
from test_checkpoints import EVERY_STEP, NEVER, numbers, signal_at_forward
from test_kill import Place, check_nothing_is_left, check_same, make_place
from tracked import quiet, runs_in, trials_in, words_of
from zygote import Zygote

from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig
from adaptive_lora.interruption import Interrupted, interruptible, whole
from adaptive_lora.runner import trial as study_trial
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.leases import LEASE
from adaptive_lora.training import TrialCheckpoints
from adaptive_lora.training import checkpoint_files as files

__all__ = ["make_place"]  # fixtures

BaseContext = Callable[..., StudyContext]


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_study_says_how_to_go_on_and_does(
    zygote: Zygote, make_place: Any, kind: signal.Signals, code: int
) -> None:
    """In a real process: runs KILLED, a checkpoint there, the exit code of the signal."""
    place: Place = make_place("stopped")
    words = [*place.words, "--max-steps=2000", "--epochs=900", "--checkpoint-steps=1000000"]
    pid = zygote.start(words, place.folder)
    outbox = place.folder / "adaptive-lora-out"
    while not any("train/loss" in path.read_text() for path in outbox.glob("spool/*/journal.jsonl")):
        time.sleep(0.05)
    os.kill(pid, kind)
    assert zygote.wait(pid) == code
    log = (place.folder / "log.txt").read_text(encoding="utf-8")
    assert "Interrupted; the same command continues where it stopped." in log
    assert "Traceback" not in log
    assert {run.info.status for run in runs_in(place.folder)} == {"KILLED"}
    assert len(trials_in(place.folder)) == 1
    assert not [key for run in runs_in(place.folder) for key in run.data.tags if key.startswith(LEASE)]
    (checkpoint,) = outbox.glob("checkpoints/*/*/training1-step*")
    assert files.read_checkpoint(checkpoint)["snapshot"]["losses"]


STAGES = (
    ("adaptive_lora.runner.run", "_describe", 1, "before"),
    ("adaptive_lora.runner.trial_context", "TrialOnBase.train", 1, "before"),
    ("adaptive_lora.tracking.recorder", "Recorder.model", 1, "before"),
    ("adaptive_lora.runner.trial_log", "trial_metrics", 2, "after"),
    ("adaptive_lora.runner.run", "judge", 1, "before"),
    ("mlflow", "MlflowClient.create_model_version", 1, "after"),
)


def test_sigterm_at_any_stage_leaves_nothing_running(zygote: Zygote, make_place: Any) -> None:
    place: Place = make_place("staged")
    for stage in STAGES:
        assert zygote.run(place.words, place.folder, (*stage, signal.SIGTERM)) == 143, stage
        statuses = {run.info.status for run in runs_in(place.folder)}
        assert "KILLED" in statuses, stage
        assert statuses <= {"KILLED", "FINISHED"}, stage
    log = (place.folder / "log.txt").read_text(encoding="utf-8")
    assert log.count("Interrupted; the same command continues where it stopped.") == len(STAGES)
    assert "Traceback" not in log
    assert zygote.run(place.words, place.folder) == 0
    check_nothing_is_left(place)


def test_signals_wait_for_what_must_not_be_cut_in_two() -> None:
    done = []

    def work() -> None:
        with interruptible():
            with whole():
                signal.raise_signal(signal.SIGTERM)
                done.append("first")
                with whole():
                    done.append("second")
            done.append("never")

    with pytest.raises(Interrupted) as stop:
        work()
    assert done == ["first", "second"]
    assert stop.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_command_on_a_study_leaves_or_waits(zygote: Zygote, make_place: Any) -> None:
    """The second says who is at it; one with --wait goes on when the first is killed: each trial exactly once."""
    reference, place = make_place("alone"), make_place("shared")
    assert zygote.run(reference.words, reference.folder) == 0

    def said() -> str:
        return " ".join((place.folder / "log.txt").read_text(encoding="utf-8").split())

    first = zygote.start(place.words, place.folder)
    while not trials_in(place.folder):
        time.sleep(0.05)
    suspend(first, place.folder / "mlflow.db")  # else it might end meanwhile
    before = {run.info.run_id for run in runs_in(place.folder)}
    assert zygote.run(place.words, place.folder) == 2
    assert f"is run by another command: process {first} of" in said()
    waiting = zygote.start([*place.words, "--wait"], place.folder)
    while "waiting until it ends" not in said():
        time.sleep(0.05)
    assert {run.info.run_id for run in runs_in(place.folder)} == before
    os.kill(first, signal.SIGKILL)
    assert zygote.wait(first) == -signal.SIGKILL
    assert zygote.wait(waiting) == 0, said()
    assert "Traceback" not in said()
    assert before <= {run.info.run_id for run in runs_in(place.folder)}
    check_same(place, reference)


def suspend(pid: int, database: Path) -> None:
    """Suspend a process where it does not hold the lock of a database."""
    with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as other:
        while True:
            os.kill(pid, signal.SIGSTOP)
            with suppress(sqlite3.OperationalError):
                other.execute("BEGIN IMMEDIATE")
                other.execute("ROLLBACK")
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)


def test_changed_data_is_refused_with_both_digests(
    in_store: Callable[..., StudyConfig], data_file: Path, tmp_path: Path
) -> None:
    config = in_store()
    quiet(config)
    before = [run.info.run_id for run in runs_in(tmp_path)]
    digest = trials_in(tmp_path)[0].data.tags["data_digest"]
    data_file.write_text(json.dumps(rows(40, seed=1)), encoding="utf-8")
    result = CliRunner().invoke(main, ["study", *words_of(_given(config))])
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert f"data {data_file} changed (digest {digest} then," in text
    assert re.search(r"then, [0-9a-f]+ now\) since study study-[0-9a-f]+ began", text)
    assert "--study NAME" in text
    assert [run.info.run_id for run in runs_in(tmp_path)] == before
    renamed = CliRunner().invoke(main, ["study", *words_of({**_given(config), "study": "new"})])
    assert renamed.exit_code == 0, renamed.output
    data_file.write_text(json.dumps(rows(40)), encoding="utf-8")
    again, _ = quiet(config)  # put back, the first study goes on
    assert again.trials_run == 0


def _given(config: StudyConfig) -> dict[str, object]:
    """Return a small study's settings as options."""
    flat = {key: value for key, value in config.flat().items() if value not in (None, [])}
    lists = {key: " ".join(map(str, v)) for key, v in flat.items() if isinstance(v, list)}
    return {**flat, **lists}


def test_a_changed_base_is_refused_with_both_hashes(
    in_store: Callable[..., StudyConfig], base_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    config = in_store(model=str(base))
    quiet(config)
    first = trials_in(tmp_path)[0].data.tags["base_hash"]
    weights = load_file(base / "model.safetensors")
    weights["transformer.wpe.weight"] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(main, ["study", *words_of(_given(config))])
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert f"changed (SHA-256 {first[:16]} then, " in text
    assert len(runs_in(tmp_path)) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_disk_that_takes_nothing_costs_checkpoints_not_the_trial(
    make_bench: BaseContext, tmp_path: Path, small_disk: Path, state: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    context = make_bench(methods="uniform:rank=2", seeds="0", max_steps=4)
    (trial,) = context.config.trials()
    expected = numbers(run_trial(context, trial, tmp_path / "whole"))
    if state == "full":
        with pytest.raises(OSError, match="No space left"):
            fill(small_disk / "filler")
        reason = "No space left"
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        reason = "Read-only file system"
    kept = TrialCheckpoints(small_disk / "kept", EVERY_STEP)
    outcome = run_trial(context, trial, tmp_path / "again", checkpoints=kept)
    assert numbers(outcome) == expected
    assert reason in caplog.text
    assert "The trial continues without." in caplog.text
    assert not list(small_disk.rglob("*.partial-*"))


@pytest.fixture
def output_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of its own for the output folder."""
    disk = SmallDisk(tmp_path / "disk", 16)
    if not disk.own:
        pytest.skip("no file system can be mounted here")
    yield disk
    disk.remove()


def test_a_full_output_disk_ends_a_study_that_goes_on_when_there_is_room(
    in_store: Callable[..., StudyConfig], output_disk: SmallDisk, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Records have no other place, so nothing goes on without them; none of those made is lost."""
    config = in_store(output=str(output_disk.folder / "out"), seeds="0 1", checkpoint_steps=1)
    real, trained = study_trial.log_outcome, []

    def log_outcome(context: Any, run: Any, trial: Any, outcome: Any) -> None:
        trained.append(outcome.train.losses)
        if len(trained) == 2:
            output_disk.fill()
        real(context, run, trial, outcome)

    monkeypatch.setattr(study_trial, "log_outcome", log_outcome)
    result = CliRunner().invoke(main, ["study", *words_of(_given(config))])
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert "results cannot be kept in" in text
    assert "No space left on device" in text
    assert "Free some disk space or set --output" in text
    assert text.count("Errno") <= 1  # not one for each file of the adapter
    output_disk.free()
    result = CliRunner().invoke(main, ["study", *words_of(_given(config))])
    assert result.exit_code == 0, result.output
    assert len(trained) == 3
    assert trained[1] == trained[2]  # brought back, or trained again, to the same bits
    assert Counter(run.info.status for run in runs_in(tmp_path)) == {"FINISHED": 3}
    losses = [run.data.metrics["train/loss"] for run in trials_in(tmp_path)]
    assert losses == [trained[0][-1], trained[2][-1]]


def test_a_read_only_output_folder_is_a_clear_error(
    in_store: Callable[..., StudyConfig], output_disk: SmallDisk
) -> None:
    words = ["mount", "-o", "remount,ro", str(output_disk.folder)]
    subprocess.run(words, check=True)
    config = in_store(output=str(output_disk.folder / "out"))
    result = CliRunner().invoke(main, ["study", *words_of(_given(config))])
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert str(output_disk.folder) in text
    assert "Read-only file system" in text
    assert "--output" in text


@pytest.mark.parametrize("poisoned", [2, 3, 4])
def test_nan_at_any_step_also_of_a_resumed_trial(make_bench: BaseContext, tmp_path: Path, poisoned: int) -> None:
    """The step is left out and counted, whether it comes before the stop, at it or after it."""
    context = make_bench(methods="uniform:rank=2", seeds="0", max_steps=5, batch_size=4)
    (trial,) = context.config.trials()

    def poison(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> Any:
        if not module.training:
            return None
        calls["count"] += 1
        return output * torch.nan if calls["count"] == poisoned else None

    calls = {"count": 0}
    layer = context.base.model.get_submodule("transformer.ln_f")
    hook = layer.register_forward_hook(poison)
    expected = numbers(run_trial(context, trial, tmp_path / "whole"))
    assert expected["train"].skipped_steps == 1
    calls["count"] = 0
    kept = tmp_path / "kept"
    with signal_at_forward(context, 3, signal.SIGTERM), interruptible(), pytest.raises(Interrupted):
        run_trial(context, trial, tmp_path / "cut", checkpoints=TrialCheckpoints(kept, NEVER))
    calls["count"] = 2  # the third step begins anew
    outcome = run_trial(context, trial, tmp_path / "again", checkpoints=TrialCheckpoints(kept, NEVER))
    hook.remove()
    found = numbers(outcome)
    assert repr(found.pop("train")) == repr(expected.pop("train"))  # NaN differs from itself
    assert found == expected


def test_more_methods_and_seeds_change_no_other_trial(make_bench: BaseContext, tmp_path: Path) -> None:
    """A trial alone, and as the last of a grid with other methods and seeds: the same bits."""
    own = {"dropout": 0.1, "max_steps": 6, "epochs": 9}
    moving = "grow_prune:rank=2,interval=2"
    alone = make_bench(methods=moving, seeds="5", **own)
    (trial,) = alone.config.trials()
    expected = numbers(run_trial(alone, trial, tmp_path / "alone"))
    grid = make_bench(methods=f"uniform:rank=2 adalora:rank=2 {moving}", seeds="3 5", **own)
    *others, last = grid.config.trials()
    for number, other in enumerate(others):
        run_trial(grid, other, tmp_path / str(number))
    assert numbers(run_trial(grid, last, tmp_path / "last")) == expected
    assert grid.signature(last) == alone.signature(trial)


HALF_WRITTEN = """
import os, signal, sqlite3, sys
file = sqlite3.connect(sys.argv[1])
file.execute("PRAGMA cache_size = 2")  # pages go to the file before the end
file.execute("CREATE TABLE half AS SELECT randomblob(100000) FROM experiments, experiments")
file.execute("UPDATE experiments SET name = 'lost'")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_store_that_a_process_left_half_written_is_used(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    """SQLite rolls back what a dead process began; a read-only look at it cannot."""
    config = in_store(max_steps=1)
    database = tmp_path / "mlflow.db"
    done = subprocess.run([sys.executable, "-c", HALF_WRITTEN, str(database)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert database.with_name("mlflow.db-journal").exists()
    store = connect(config.tracking)
    assert store.client.get_experiment(store.experiment_id).name == "adaptive-lora"
