"""One command at a time on a study: leases that exclude and expire, trials that are continued."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tracked import store_in

from adaptive_lora.config import TrackingConfig
from adaptive_lora.errors import LeaseLost, StudyInUse, TrackingError
from adaptive_lora.tracking import Store, StudyRun, connect
from adaptive_lora.tracking.journal import Journal, new_key
from adaptive_lora.tracking.leases import LEASE, Lease, Owner, Watch
from adaptive_lora.tracking.recorder import new_run
from adaptive_lora.tracking.runs import KIND, SIGNATURE, STUDY_ID

ELSEWHERE = replace(Owner.here(), host="node7", machine="0123456789ab", token="abcdef", beats=1)
"""The owner of a lease on another machine."""
TAGS = {"method": "m", "seed": "0", "fold": "0", "lr": "1", SIGNATURE: "s"}


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Store:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return connect(TrackingConfig(tracking_uri=store_in(tmp_path)))


def open_study(store: Store, silence: float = 60.0, signature: str = "", wait: bool = False) -> StudyRun:
    """Open the study as a command of its own does."""
    own = connect(TrackingConfig(tracking_uri=store.uri, output=str(store.outbox.folder.parent)))
    return StudyRun.open(own, study_id="s-1", name="s", silence=silence, signature=signature, wait=wait)


def leases_of(store: Store, study: StudyRun) -> dict[str, str]:
    """Return the tags of leases of a study's parent run."""
    tags = MlflowClient(store.uri).get_run(study.run_id).data.tags
    return {key: value for key, value in tags.items() if key.startswith(LEASE)}


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_lost(study: StudyRun) -> bool:
    try:
        study.check()
    except LeaseLost:
        return True
    return False


def test_silence_is_measured_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock of the owner's counts, and no time in which nobody looked."""
    now = {"time": 1000.0}
    monkeypatch.setattr("adaptive_lora.tracking.leases.time.monotonic", lambda: now["time"])
    watch = Watch(10.0)

    def look(beats: int, after: float) -> bool:
        now["time"] += after
        return watch.is_over(replace(ELSEWHERE, beats=beats))

    assert not look(1, 0)
    assert not look(1, 4)
    assert not watch.is_seen_alive(ELSEWHERE)
    assert not look(1, 3600)  # the store was away: five seconds of it count
    assert not look(0, 4)  # a sign of life, whatever the counter says
    assert watch.is_seen_alive(ELSEWHERE)
    assert not look(0, 4)
    assert not look(0, 4)
    assert look(0, 4)


def test_owners_know_their_own_dead(store: Store) -> None:
    study = open_study(store)
    ((_, text),) = leases_of(store, study).items()
    here = Owner.parse(text)
    assert here is not None
    assert Owner.parse(str(here)) == here
    assert not here.is_gone
    assert replace(here, started="another start").is_gone
    assert not replace(here, started="another start", machine="another").is_gone
    for odd in ("written by hand", "[]", "{}", str(here).replace(str(here.pid), '"1"'), "[" * 100_000):
        assert Owner.parse(odd) is None
    study.end("FINISHED")
    assert here.is_gone
    assert not leases_of(store, study)


def test_one_command_at_a_time(store: Store) -> None:
    first = open_study(store)
    with pytest.raises(StudyInUse, match=r"process \d+ of .* on .*, since 20.* UTC\. Wait for its end with --wait"):
        open_study(store)
    with pytest.raises(StudyInUse):
        open_study(store, signature="a")
    assert len(leases_of(store, first)) == 1
    first.end("FINISHED")
    one, other = open_study(store, signature="a"), open_study(store, signature="b")
    assert one.run_id == other.run_id == first.run_id
    with pytest.raises(StudyInUse):
        open_study(store, signature="a")
    with pytest.raises(StudyInUse):
        open_study(store)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(open_study, store, 0.8, "", True)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        for study in (one, other):
            study.end("FINISHED")
        assert waiting.result(60).run_id == first.run_id


Study = Callable[..., StudyRun]


def begin_at_once(open_one: Study, keys: Sequence[str]) -> str:
    """Take leases of one study in as many threads; return the id of its parent run.

    Those that exclude each other must never be held at the same time.
    """
    together, held, guard = threading.Barrier(len(keys)), list[str](), threading.Lock()

    def begin(key: str) -> str:
        together.wait()
        study = open_one(signature=key, wait=True)
        with guard:
            assert not held if key == "" else not {key, ""} & set(held)
            held.append(key)
        time.sleep(0.05)
        with guard:
            held.remove(key)
        study.check()
        study.end("FINISHED")
        return study.run_id

    with ThreadPoolExecutor(len(keys)) as pool:
        (run_id,) = set(pool.map(begin, keys))
    return run_id


@pytest.mark.parametrize("keys", [("", "", ""), ("a", "b", "a", ""), ("a", "b", "c", "d")])
def test_commands_that_begin_at_once_have_one_parent(store: Store, keys: tuple[str, ...]) -> None:
    """However their requests interleave."""
    parent = begin_at_once(partial(open_study, store), keys)
    runs = store.client.search_runs([store.experiment_id], f"tags.{STUDY_ID} = 's-1' and tags.`{KIND}` = 'study'")
    assert [run.info.run_id for run in runs] == [parent]


def test_a_dead_command_elsewhere_is_followed_after_its_silence(store: Store) -> None:
    study = open_study(store)
    study.end("KILLED")
    for key in (LEASE, f"{LEASE}.left", "adaptive_lora.claim"):
        store.client.set_tag(study.run_id, key, str(ELSEWHERE))
    started = time.monotonic()
    again = open_study(store, silence=0.4)
    assert time.monotonic() - started >= 0.4
    assert again.run_id == study.run_id
    assert list(leases_of(store, again)) == [LEASE]


def test_a_living_command_elsewhere_is_left_alone(store: Store) -> None:
    """Its first sign of life is waited for, not its end."""
    study = open_study(store)
    study.end("KILLED")
    store.client.set_tag(study.run_id, LEASE, str(ELSEWHERE))
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        store.client.set_tag(study.run_id, LEASE, str(replace(ELSEWHERE, beats=2)))

    with pytest.raises(StudyInUse, match="on node7, since"):
        StudyRun.open(store, study_id="s-1", name="s", silence=4.0, say=say)
    assert "waiting until it gives a sign of life, or is silent for" in said[0]


def test_a_command_beats_and_sees_what_it_lost(store: Store) -> None:
    study = open_study(store, silence=0.4)
    (first,) = leases_of(store, study).values()
    wait_for(lambda: list(leases_of(store, study).values()) != [first])
    study.check()
    run = study.begin_trial("trial", TAGS, earlier=())
    run.flush(60)

    def lose() -> None:
        with study.trial(run):
            wait_for(lambda: taken_over(store, study) and is_lost(study))
            study.check()

    with pytest.raises(LeaseLost, match="another command took study s-1 over"):
        lose()
    run_id = run.run_id
    study.end("KILLED")
    assert leases_of(store, study) == {LEASE: str(ELSEWHERE)}  # it is the other's now
    client = MlflowClient(store.uri)
    assert {client.get_run(each).info.status for each in (run_id, study.run_id)} == {"RUNNING"}


def taken_over(store: Store, study: StudyRun) -> bool:
    """Write the lease of another machine, as its heartbeat does again and again."""
    MlflowClient(store.uri).set_tag(study.run_id, LEASE, str(ELSEWHERE))
    return True


def test_a_late_heartbeat_does_not_overwrite_the_lease_of_another(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read its own lease, and was stopped until it was taken for dead."""
    study = open_study(store, silence=0.4)
    client, read, goes_on = study.store.outbox.uploader.client, threading.Event(), threading.Event()
    whole = client.get_run

    def slow(run_id: str) -> Run:
        found = whole(run_id)
        read.set()
        assert goes_on.wait(60)
        return found

    monkeypatch.setattr(client, "get_run", slow)
    assert read.wait(60)
    time.sleep(0.1)
    taken_over(store, study)
    goes_on.set()
    wait_for(lambda: is_lost(study))
    assert leases_of(store, study) == {LEASE: str(ELSEWHERE)}


def test_a_heartbeat_on_its_way_holds_nobody_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during an outage: a request may take minutes to fail, and is not waited for."""
    study = open_study(store, silence=0.4)
    begun, answered = threading.Event(), threading.Event()

    def hanging(lease: Lease) -> bool:
        begun.set()
        answered.wait()
        raise TrackingError("away")

    monkeypatch.setattr(Lease, "_is_own", hanging)
    assert begun.wait(60)
    monkeypatch.setattr(study.store.outbox, "away", "it does not answer")
    assert study._lease is not None
    study._lease.release()
    assert not answered.is_set()
    answered.set()  # the thread ends


def test_a_trial_begins_without_a_request(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(store)
    calls: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        whole = getattr(study.store.client, name)

        def call(*words: object, **named: object) -> object:
            calls.append(name)
            return whole(*words, **named)

        return call

    for name in ("search_runs", "get_run", "set_tag", "create_run", "get_metric_history"):
        monkeypatch.setattr(study.store.client, name, counted(name), raising=False)
    run = study.begin_trial("trial", TAGS, earlier=())
    with study.trial(run):
        run.metric("train/loss", 1.0, 1)
    assert calls == []
    assert run.flush(60)
    study.begin_trial("trial", {**TAGS, SIGNATURE: "other"}).flush(60)
    assert calls == ["search_runs"]


def test_a_run_that_a_dead_process_never_got_is_not_made_beside_the_trial(store: Store) -> None:
    """It was killed between writing its journal and making the run; another trained the trial."""
    study = open_study(store)
    tags = {**TAGS, STUDY_ID: "s-1", KIND: "trial"}
    left = Journal.create(store.outbox.folder, new_key(), new_run(store, "trial", tags))
    left.append("tags", {"values": tags})
    left.release()
    run = study.begin_trial("trial", TAGS, earlier=())
    with study.trial(run):
        pass
    assert run.flush(60)
    study.deliver_left()
    assert [child.info.run_id for child in study.children()] == [run.run_id]
    assert not left.folder.exists()


def test_the_run_of_a_dead_process_is_continued(store: Store) -> None:
    """A continued trial keeps its run, its metrics once; a worker process that is made from ids does so too."""
    study = open_study(store)
    run = study.begin_trial("trial", TAGS, earlier=())
    run.metric("train/loss", 1.0, 1)
    run.flush(60)
    run.leave()
    worker = StudyRun(study.store, study.run_id, "s-1")
    again = worker.begin_trial("trial", TAGS)
    assert again.run_id == run.run_id
    with worker.trial(again):
        again.metric("train/loss", 1.0, 1)
        again.metric("train/loss", 2.0, 2)
    again.flush(60)
    history = store.client.get_metric_history(run.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2]
    (only,) = study.children()
    assert only.info.status == "FINISHED"


def test_records_that_another_process_is_delivering_are_waited_for(store: Store) -> None:
    """Else what is on its way would be recorded once more."""
    study = open_study(store)
    run = study.begin_trial("trial", TAGS, earlier=())
    run.flush(60)
    run.leave()
    header = {"run_id": run.run_id, "store": store.shown_uri, "ends": True, "once": True}
    left = Journal.create(store.outbox.folder, "left", header)
    left.append("metric", {"k": "train/loss", "v": 1.0, "s": 1, "t": 1})
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(study.begin_trial, "trial", TAGS)
        with pytest.raises(TimeoutError):
            taking.result(0.5)
        left.release()
        again = taking.result(60)
    again.metric("train/loss", 1.0, 1)
    again.flush(60)
    assert len(store.client.get_metric_history(run.run_id, "train/loss")) == 1


def test_duplicates_of_earlier_versions_leave_the_study(store: Store) -> None:
    runs = []
    for number in range(2):
        tags = {**TAGS, STUDY_ID: "s-1", KIND: "trial"}
        run = store.client.create_run(store.experiment_id, tags=tags, start_time=1000 + number)
        runs.append(run.info.run_id)
    study = open_study(store)
    taken = study.begin_trial("trial", TAGS, earlier=study.unfinished["s"])
    assert taken.run_id == runs[0]
    other = store.client.get_run(runs[1])
    assert other.info.status == "KILLED"
    assert other.data.tags["superseded_by"] == runs[0]
    with pytest.raises(KeyboardInterrupt), study.trial(taken):
        raise KeyboardInterrupt
    taken.flush(60)
    (only,) = study.children()
    assert (only.info.run_id, only.info.status) == (runs[0], "KILLED")
