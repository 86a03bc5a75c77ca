"""Journals on local disk and their delivery into a SQLite store, without a server."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tracked import store_in

from adaptive_lora.cli import main
from adaptive_lora.config import TrackingConfig
from adaptive_lora.errors import TrackingError, Undelivered
from adaptive_lora.tracking import Recorder, Store, connect
from adaptive_lora.tracking.journal import FILES, LOCK, RECORDS, Journal, journals, sweep
from adaptive_lora.tracking.retries import Backoff, reason_of
from adaptive_lora.tracking.sync import deliver_left, sync_folder
from adaptive_lora.tracking.uploader import RUN_KEY

HEADER = {"run_id": "0" * 32, "store": "sqlite:///x.db"}


@pytest.fixture
def tracking(empty_store: Path, tmp_path: Path) -> TrackingConfig:
    """A store and an output folder of this test's own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return TrackingConfig(tracking_uri=store_in(tmp_path), output=str(tmp_path / "out"))


def points(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric as the store has it."""
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def last_words(config: TrackingConfig, steps: int) -> None:
    """Record in a process of its own, which is killed in the middle of it."""
    store = connect(config)
    run = Recorder.begin(store, "killed", {"colour": "red"})
    run.params({"trial.seed": 1})
    for step in range(steps):
        run.metric("train/loss", 1 / (step + 1), step)
    run.json("plan.json", {"ranks": [1, 2]})
    os.kill(os.getpid(), signal.SIGKILL)


def leave_behind(config: TrackingConfig, steps: int) -> None:
    """Let a process die; its journal stays."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adaptive_lora.tracking"])  # its imports take seconds
    process = context.Process(target=last_words, args=(config, steps))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@given(cut=st.integers(min_value=0, max_value=400))
def test_what_a_crash_cuts_off_counts_as_not_written(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    journal = Journal.create(tmp_path_factory.mktemp("spool"), "run", HEADER)
    for step in range(5):
        journal.append("metric", {"k": "a", "v": 0.1 * step, "s": step, "t": step})
    journal.release()
    path = journal.folder / RECORDS
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    again = Journal.take(journal.folder)
    assert again is not None
    assert len(list(again.records(0))) == whole
    again.append("metric", {"k": "b", "v": 1.0, "s": 9, "t": 9})
    assert [record.values.get("k") for record in again.records(0)][-1] == "b"
    assert len(list(again.records(0))) == whole + 1
    again.remove()
    assert not journal.folder.exists()


def test_one_process_at_a_time_holds_a_journal(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "run", HEADER)
    assert Journal.take(journal.folder) is None
    journal.release()
    again = Journal.take(journal.folder)
    assert again is not None
    assert again.header == {"op": "run", **HEADER} or again.header == HEADER
    again.release()


def test_a_journal_that_is_being_removed_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the release of its lock and the removal of its folder."""
    journal = Journal.create(tmp_path, "run", HEADER)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *given, **words: None)
        journal.remove()
    for _ in range(2):  # the first attempt has released the lock, and made no new file
        with pytest.raises(FileNotFoundError):
            Journal.take(journal.folder)
    assert not (journal.folder / RECORDS).exists()


def test_a_journal_in_a_folder_that_is_none_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file")
    with pytest.raises(TrackingError, match="set --output to a folder"):
        Journal.create(tmp_path / "spool", "run", HEADER)


def test_waits_double_up_to_a_limit_and_are_jittered() -> None:
    backoff = Backoff(first=1.0, longest=8.0)
    waits = [backoff.next() for _ in range(6)]
    for wait, whole in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert whole / 2 <= wait <= whole
    assert len(set(waits)) == 6
    backoff.reset()
    assert backoff.next() <= 1


def test_a_run_arrives_in_order_and_leaves_nothing_behind(tracking: TrackingConfig, tmp_path: Path) -> None:
    store = connect(tracking)
    run = Recorder.begin(store, "one", {"colour": "red"})
    run.params({f"p.{number}": number for number in range(150)})
    for step in range(2500):
        run.metric("train/loss", 1 / (step + 1), step)
    run.metric("train/loss", float("nan"), 2500)
    run.text("notes/a.txt", "Grüße\n")
    run.data("rows", "d" * 16, "rows.json", 3)
    run.tags({"colour": "blue"})
    run.end("FINISHED")
    store.settle()
    found = store.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["colour"] == "blue"
    assert len(found.data.params) == 150
    assert points(store.client, run.run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert found.inputs.dataset_inputs[0].dataset.digest == "d" * 16
    path = Path(store.client.download_artifacts(run.run_id, "notes/a.txt"))
    assert path.read_text(encoding="utf-8") == "Grüße\n"
    store.close()
    assert not (tmp_path / "out" / "spool").exists()


def test_what_a_killed_process_left_is_delivered_once(tracking: TrackingConfig) -> None:
    leave_behind(tracking, 300)
    outcomes = [one for _ in range(2) for one in sync_folder(tracking)]
    assert [(one.metrics, one.found, one.left) for one in outcomes] == [(300, 300, "")]
    client = MlflowClient(tracking.tracking_uri)
    run = client.get_run(outcomes[0].run_id)
    assert run.info.status == "KILLED"
    assert run.data.params == {"trial.seed": "1"}
    expected = [(step, 1 / (step + 1)) for step in range(300)]
    assert points(client, run.info.run_id, "train/loss") == expected
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"plan.json"}

    store = connect(tracking)  # a trial that goes on from the checkpoint at step 200
    again = Recorder.resume(store, run.info.run_id)
    again.params({"trial.seed": 1, "trial.more": 2})
    for step in range(200, 400):
        again.metric("train/loss", 1 / (step + 1), step)
    again.end("FINISHED")
    store.settle()
    store.close()
    assert points(client, run.info.run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(400)]
    run = client.get_run(run.info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"trial.seed": "1", "trial.more": "2"}


def test_a_journal_of_a_run_that_another_process_finished_changes_nothing(tracking: TrackingConfig) -> None:
    leave_behind(tracking, 20)
    outbox = Path(tracking.output) / "spool"
    kept = outbox.with_name("kept")
    shutil.copytree(outbox, kept)
    (first,) = sync_folder(tracking)
    store = connect(tracking)
    Recorder.resume(store, first.run_id).end("FINISHED")
    store.settle()
    store.close()
    folder = journals(kept)[0]
    note = f'{{"facts": {{"run_id": "{first.run_id}"}}}}\n'
    (folder / "delivered.jsonl").write_text(note, encoding="utf-8")
    kept.rename(outbox)
    (second,) = sync_folder(tracking)
    assert second.left == ""
    run = store.client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert len(points(store.client, first.run_id, "train/loss")) == 20


def test_a_run_that_was_deleted_is_reported_once_and_holds_nothing_up(
    tracking: TrackingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    store = connect(tracking)
    gone, fine = (Recorder.begin(store, name, {}) for name in ("gone", "fine"))
    assert gone.flush(patience=60)
    store.client.delete_run(gone.run_id)
    for step in range(5):
        gone.metric("a", 1.0, step)
        fine.metric("a", 1.0, step)
    gone.end("FINISHED")
    fine.end("FINISHED")
    with pytest.raises(Undelivered, match=r"1 run .*must be in the 'active'.*adaptive-lora sync"):
        store.settle()
    assert sum("refuses run" in record.message for record in caplog.records) == 1
    assert store.client.get_run(fine.run_id).info.status == "FINISHED"
    store.close()
    result = CliRunner().invoke(main, ["sync", tracking.output, f"--tracking-uri={tracking.tracking_uri}"])
    assert result.exit_code == 3, result.output
    assert "1 journals, 1 left; metrics sent 5, found 0" in result.output
    store.client.restore_run(gone.run_id)
    result = CliRunner().invoke(main, ["sync", tracking.output, f"--tracking-uri={tracking.tracking_uri}"])
    assert result.exit_code == 0, result.output
    assert "1 journals, 0 left; metrics sent 5, found 5" in result.output
    result = CliRunner().invoke(main, ["sync", tracking.output])
    assert result.exit_code == 0, result.output
    assert "nothing is waiting" in result.output


def test_what_a_late_request_made_twice_is_removed(tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store = connect(tracking)
    create, asked = store.outbox.uploader.client.create_run, list[str]()

    def unanswered(*args: Any, **options: Any) -> Any:
        asked.append("create")
        if len(asked) == 1:
            raise MlflowException("timed out")
        return create(*args, **options)

    monkeypatch.setattr(store.outbox.uploader.client, "create_run", unanswered)
    run = Recorder.begin(store, "one", {})
    assert run.flush(patience=60)
    assert len(asked) == 2
    key = store.client.get_run(run.run_id).data.tags[RUN_KEY]
    late = store.client.create_run(store.experiment_id, tags={RUN_KEY: key}).info.run_id
    run.metric("a", 1.0)
    run.end("FINISHED")
    store.settle()
    store.close()
    (left,) = store.client.search_runs([store.experiment_id])
    assert left.info.run_id == run.run_id != late
    assert left.data.metrics == {"a": 1.0}


def test_where_every_request_is_answered_nothing_is_searched_for(
    tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = connect(tracking), list[str]()

    def count(name: str) -> None:
        call = getattr(MlflowClient, name)

        def counted(*args: Any, **options: Any) -> Any:
            asked.append(name)
            return call(*args, **options)

        monkeypatch.setattr(MlflowClient, name, counted)

    for name in ("search_runs", "search_logged_models", "create_run", "get_run", "update_run", "set_terminated"):
        count(name)
    run = Recorder.begin(store, "one", {})
    run.json("values.json", {"a": 1})
    run.metric("a", 1.0)
    run.end("FINISHED")
    store.settle()
    store.close()
    assert asked == ["create_run", "set_terminated"]


def test_journals_of_another_store_are_left_alone(tracking: TrackingConfig) -> None:
    leave_behind(tracking, 3)
    store: Store = connect(tracking)
    outbox = Path(tracking.output) / "spool"
    (one,) = deliver_left(outbox, store.outbox.uploader, "http://elsewhere:5000")
    assert one.left == f"it belongs to {tracking.tracking_uri}"
    assert journals(outbox)


def test_a_journal_that_another_process_has_just_delivered_is_no_error(
    tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may go away between its lock file being made and being opened."""
    leave_behind(tracking, 3)
    store = connect(tracking)
    outbox = store.outbox.folder

    def gone(folder: Path) -> None:
        shutil.rmtree(folder)
        raise FileNotFoundError(folder / "lock")

    monkeypatch.setattr(Journal, "take", gone)
    assert list(deliver_left(outbox, store.outbox.uploader, store.shown_uri)) == []
    store.close()


def test_reasons_hold_no_password() -> None:
    assert reason_of(OSError("http://ann:s3cret@host refused\nmore")) == "http://***@host refused"


def test_what_a_process_left_before_its_first_record_is_swept(tmp_path: Path) -> None:
    unborn, held, foreign, mixed = (
        tmp_path / name
        for name in ("1795689904580-d7a7dac2ff1f", "1795689904581-d7a7dac2ff1f", "mine",
                     "1795689904582-d7a7dac2ff1f")
    )  # fmt: skip
    for folder in (unborn, held, foreign, mixed):
        (folder / FILES).mkdir(parents=True)
    (mixed / "my own.txt").write_text("kept", encoding="utf-8")
    with FileLock(held / LOCK):
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([held, foreign, mixed])
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, mixed])


def test_a_journal_is_made_although_it_is_taken_for_left(tmp_path: Path) -> None:
    """The folder goes between its making and its lock, as a sweep elsewhere would have it."""
    key, made = "1795689904580-d7a7dac2ff1f", Path.mkdir
    swept = []

    def swept_once(path: Path, *words: Any, **options: Any) -> None:
        made(path, *words, **options)
        if path.name == FILES and not swept:
            swept.append(path)
            sweep(tmp_path)
            assert not path.exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", swept_once)
        journal = Journal.create(tmp_path, key, HEADER)
    journal.append("metric", {"k": "a", "v": 1.0, "s": 0, "t": 1})
    journal.release()
    assert swept
    assert journals(tmp_path) == [tmp_path / key]
