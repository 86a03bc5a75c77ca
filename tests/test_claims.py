"""Several processes on one study: turns that exclude, claims that expire, nothing done twice."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tracked import store_in

from adaptive_lora.config import TrackingConfig
from adaptive_lora.errors import LeaseLost, TrackingError
from adaptive_lora.tracking import Recorder, Store, StudyRun, connect
from adaptive_lora.tracking.journal import Journal, new_key
from adaptive_lora.tracking.leases import LEASE, Heartbeat, Leases, Owner, Patience
from adaptive_lora.tracking.recorder import new_run
from adaptive_lora.tracking.runs import KIND, SIGNATURE, STUDY_ID
from adaptive_lora.tracking.study_run import TrialStatus

ELSEWHERE = "0123456789ab/1/1/abcdef"
"""An owner on another machine."""
TAGS = {"method": "m", "seed": "0", "fold": "0", "lr": "1", SIGNATURE: "s"}


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Store:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return connect(TrackingConfig(tracking_uri=store_in(tmp_path)))


def add_in_turns(uri: str, place: Path, rounds: int) -> None:
    """Read a number, wait, write it back one higher: without turns most additions get lost."""
    leases = Leases(connect(TrackingConfig(tracking_uri=uri)), "race", 60.0)
    for _ in range(rounds):
        with leases.lock():
            number = int(place.read_text())
            time.sleep(0.03)
            place.write_text(str(number + 1))


def test_turns_are_exclusive_among_processes(store: Store, tmp_path: Path) -> None:
    place = tmp_path / "number"
    place.write_text("0")
    context = multiprocessing.get_context("fork")
    uri = f"{store_in(tmp_path)}?race"  # an engine that this process never opened
    processes = [context.Process(target=add_in_turns, args=(uri, place, 8)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert place.read_text() == "32"
    assert not turns_in(store)


def test_turns_are_exclusive_among_threads(store: Store) -> None:
    """A late heartbeat takes one while its process takes a trial."""
    leases, numbers = Leases(store, "race", 60.0), [0]

    def add() -> None:
        for _ in range(3):
            with leases.lock():
                number = numbers[0]
                time.sleep(0.03)
                numbers[0] = number + 1

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(add) for _ in range(3)]:
            done.result()
    assert numbers == [9]
    assert not turns_in(store)


def turns_in(store: Store) -> list[str]:
    """Return the tags of turns that are left."""
    tags = MlflowClient(store.uri).get_experiment(store.experiment_id).tags
    return [key for key in tags if key.startswith("adaptive_lora.turn")]


def test_a_dead_process_does_not_block_the_turn(store: Store) -> None:
    """One died while it had its turn, one while it was choosing; one is of another machine."""
    leases = Leases(store, "study", 0.5)
    gone = Owner.here()
    gone.ended()
    for owner, ticket in ((gone, 0), (ELSEWHERE, 1)):
        key = f"adaptive_lora.turn.study.{ticket}"
        store.client.set_experiment_tag(store.experiment_id, key, f"{owner}#{ticket}#0")
    started = time.monotonic()
    with leases.lock():
        assert time.monotonic() - started >= 0.5  # nothing is known of the other machine
        assert len(turns_in(store)) == 1
    assert turns_in(store) == []


def test_silence_is_measured_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock of the owner's counts, and no time in which nobody looked."""
    now = {"time": 1000.0}
    monkeypatch.setattr("adaptive_lora.tracking.leases.time.monotonic", lambda: now["time"])
    patience = Patience(10.0)

    def look(value: str, after: float) -> bool:
        now["time"] += after
        return patience.is_over("run", value)

    assert not look(f"{ELSEWHERE}#1", 0)
    assert not look(f"{ELSEWHERE}#1", 4)
    assert not look(f"{ELSEWHERE}#1", 3600)  # the store was away: five seconds of it count
    assert not look(f"{ELSEWHERE}#0", 4)  # a sign of life, whatever the counter says
    assert not look(f"{ELSEWHERE}#0", 4)
    assert not look(f"{ELSEWHERE}#0", 4)
    assert look(f"{ELSEWHERE}#0", 4)
    assert patience.is_over("other", "written by hand")


def test_owners_know_their_own_dead() -> None:
    here = Owner.here()
    assert Owner.parse(str(here)) == here
    assert not here.is_gone
    assert Owner(here.machine, here.pid, "another start", here.token).is_gone
    assert not Owner("another machine", here.pid, "another start", here.token).is_gone
    here.ended()
    assert here.is_gone


def open_study(store: Store, silence: float = 60.0) -> StudyRun:
    return StudyRun.open(store, study_id="s-1", name="s", silence=silence)


def test_a_trial_is_taken_once(store: Store) -> None:
    one, two = open_study(store), open_study(store)
    assert one.run_id == two.run_id
    run = one.take("trial", TAGS)
    assert isinstance(run, Recorder)
    assert two.take("trial", TAGS) is TrialStatus.TAKEN
    with one.trial(run) as check:
        check()
        run.metric("train/loss", 1.0, 1)
    run.flush(60)
    assert two.take("trial", TAGS) is TrialStatus.DONE
    assert one.take("trial", TAGS) is TrialStatus.DONE
    assert len(one.children()) == 1


def test_a_run_that_a_dead_process_never_got_is_not_made_beside_the_trial(store: Store) -> None:
    """It was killed between writing its journal and making the run; another trained the trial."""
    study = open_study(store)
    tags = {**TAGS, STUDY_ID: "s-1", KIND: "trial"}
    left = Journal.create(store.outbox.folder, new_key(), new_run(store, "trial", tags))
    left.append("tags", {"values": tags})
    left.release()
    run = study.take("trial", TAGS)
    assert isinstance(run, Recorder)
    with study.trial(run), study.comparing():
        pass
    assert run.flush(60)
    assert [child.info.run_id for child in study.children()] == [run.run_id]
    assert not left.folder.exists()


def test_the_run_of_a_dead_process_is_gone_on_with(store: Store) -> None:
    """The same run, its metrics once; a claim of another machine only after its silence."""
    study = open_study(store, silence=0.4)
    run = study.take("trial", TAGS)
    assert isinstance(run, Recorder)
    run.metric("train/loss", 1.0, 1)
    run.flush(60)
    run.leave()
    store.client.set_tag(run.run_id, LEASE, f"{ELSEWHERE}#7")
    assert study.take("trial", TAGS) is TrialStatus.TAKEN
    time.sleep(0.5)
    again = study.take("trial", TAGS)
    assert isinstance(again, Recorder)
    assert again.run_id == run.run_id
    with study.trial(again):
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
    run = study.take("trial", TAGS)
    assert isinstance(run, Recorder)
    run.flush(60)
    run.leave()
    gone = Owner.here()
    gone.ended()
    store.client.set_tag(run.run_id, LEASE, f"{gone}#7")
    header = {"run_id": run.run_id, "store": store.shown_uri, "ends": True, "once": True}
    left = Journal.create(store.outbox.folder, "left", header)
    left.append("metric", {"k": "train/loss", "v": 1.0, "s": 1, "t": 1})
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(study.take, "trial", TAGS)
        with pytest.raises(TimeoutError):
            taking.result(1.0)
        left.release()
        again = taking.result(60)
    assert isinstance(again, Recorder)
    again.metric("train/loss", 1.0, 1)
    again.flush(60)
    assert len(store.client.get_metric_history(run.run_id, "train/loss")) == 1


def test_a_living_process_beats_and_sees_what_it_lost(store: Store) -> None:
    study = open_study(store, silence=0.8)
    run = study.take("trial", TAGS)
    assert isinstance(run, Recorder)

    def claim() -> str:
        return MlflowClient(store.uri).get_run(run.run_id).data.tags[LEASE]

    def lose() -> None:
        with study.trial(run) as check:
            first = claim()
            wait_for(lambda: claim() != first)
            check()
            wait_for(lambda: _taken_over(store, run) and _raises(check))
            check()

    with pytest.raises(LeaseLost):
        lose()
    assert claim() == f"{ELSEWHERE}#0"  # it is the other's now
    assert store.client.get_run(run.run_id).info.status == "RUNNING"


def test_a_sign_of_life_on_its_way_holds_nobody_up_while_the_store_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during an outage: a write may take minutes to fail, and is not waited for."""
    begun, answered = threading.Event(), threading.Event()

    def run_id() -> str:
        begun.set()
        answered.wait()
        raise TrackingError("away")

    def stop(heart: Heartbeat, **how: bool) -> None:
        heart.interval = threading.TIMEOUT_MAX  # as good as for ever, if it waited
        whole(heart, **how)

    whole = Heartbeat.stop
    monkeypatch.setattr(Heartbeat, "stop", stop)
    leases = Leases(store, "study-0", silence=0.4)
    monkeypatch.setattr(store.outbox, "away", "it does not answer")
    with leases.held(run_id):
        begun.wait()
    assert not answered.is_set()
    answered.set()  # the thread ends


def _taken_over(store: Store, run: Recorder) -> bool:
    """Write the lease of another machine, as its heartbeat does again and again."""
    store.client.set_tag(run.run_id, LEASE, f"{ELSEWHERE}#0")
    return True


def test_a_late_heartbeat_does_not_overwrite_the_lease_of_another(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read its own lease, and was stopped until it was taken for dead."""
    study = open_study(store, silence=0.8)
    run = study.take("trial", TAGS)
    assert isinstance(run, Recorder)
    client, read, goes_on = store.outbox.uploader.client, threading.Event(), threading.Event()
    whole = client.get_run

    def slow(run_id: str) -> Run:
        found = whole(run_id)
        read.set()
        assert goes_on.wait(60)
        return found

    def lose() -> None:
        with study.trial(run) as check:
            monkeypatch.setattr(client, "get_run", slow)
            assert read.wait(60)
            time.sleep(0.5)
            assert _taken_over(store, run)
            goes_on.set()
            wait_for(lambda: _raises(check))
            check()

    with pytest.raises(LeaseLost):
        lose()
    assert whole(run.run_id).data.tags[LEASE] == f"{ELSEWHERE}#0"


def test_a_lease_of_another_is_not_given_up(store: Store) -> None:
    study = open_study(store)
    run = study.take("trial", TAGS)
    assert isinstance(run, Recorder)
    assert _taken_over(store, run)
    with pytest.raises(KeyboardInterrupt), study.trial(run):
        raise KeyboardInterrupt
    assert store.client.get_run(run.run_id).data.tags[LEASE] == f"{ELSEWHERE}#0"


def _raises(check: Callable[[], None]) -> bool:
    try:
        check()
    except LeaseLost:
        return True
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_duplicates_of_earlier_versions_leave_the_study(store: Store) -> None:
    study = open_study(store)
    runs = []
    for number in range(2):
        run = store.client.create_run(
            store.experiment_id, tags={**TAGS, STUDY_ID: "s-1", "adaptive_lora.kind": "trial"}, start_time=1000 + number
        )
        runs.append(run.info.run_id)
    taken = study.take("trial", TAGS)
    assert isinstance(taken, Recorder)
    assert taken.run_id == runs[0]
    (only,) = study.children()
    assert only.info.run_id == runs[0]
    other = store.client.get_run(runs[1])
    assert other.info.status == "KILLED"
    assert other.data.tags["superseded_by"] == runs[0]
    with pytest.raises(KeyboardInterrupt), study.trial(taken):
        raise KeyboardInterrupt
    taken.flush(60)
    (only,) = study.children()
    assert only.info.status == "KILLED"
    assert only.data.tags[LEASE] == ""


def test_one_process_compares_at_a_time(store: Store) -> None:
    study = open_study(store)
    with study.comparing():
        claim = study.recorded().data.tags[LEASE]
        assert claim.startswith(str(study.leases.owner))
        assert not open_study(store).leases.is_free(study.run_id, claim)
    assert study.recorded().data.tags[LEASE] == ""
