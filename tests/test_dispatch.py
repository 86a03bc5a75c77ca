"""The dispatcher with stand-ins for workers: who gets what, and what follows where workers die, hang or cannot work."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from adaptive_lora.config import study_from
from adaptive_lora.errors import ConfigError, LeaseLost, TrackingError, TrialFailed, Undelivered, WorkerError
from adaptive_lora.interruption import Interrupted, TrainingPaused
from adaptive_lora.runner.engines.dispatch import MOST_DEATHS, Dispatcher, LegQueue
from adaptive_lora.runner.engines.messages import Alive, Broken, Died, Ended, LegEnd, Message, Ready, Shown
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.schedule import Leg, grouped
from adaptive_lora.training import StepEvent

Reaction = Callable[[Sequence[Leg]], list[Message]]


def legs_of(seeds: int = 6, methods: Sequence[str] = ("uniform",)) -> list[Leg]:
    """Return the legs of a grid."""
    return [Leg(trial=trial) for trial in study_from({"methods": list(methods), "seeds": list(range(seeds))}).trials()]


def ends(legs: Sequence[Leg]) -> list[Message]:
    return [Ended(tuple(LegEnd() for _ in legs))]


@dataclasses.dataclass(eq=False)
class StandIn:
    """A worker that reacts at once to what it is given."""

    name: str
    machine: int
    inbox: Any
    reaction: Reaction
    last: Message
    given: list[tuple[Leg, ...]] = dataclasses.field(default_factory=list)
    stopped: bool = False
    killed: bool = False
    gone: bool = False

    def assign(self, assignment: Any) -> None:
        self.given.append(assignment.legs)
        for message in self.reaction(assignment.legs):
            self.gone |= isinstance(message, Died)
            self.inbox.put((self, message))

    def stop(self) -> None:
        self.stopped = True
        self.inbox.put((self, self.last))

    def kill(self) -> None:
        self.killed = True


class StandInPool:
    """Machines with room for one worker each."""

    uses_gpus = False
    description = "stand-ins"

    def __init__(
        self,
        machines: int,
        react: Callable[[int], Reaction],
        first: Message | None = None,
        *,
        last: Message | None = None,
    ) -> None:
        self.machines, self.react = machines, react
        self.first, self.last = first or Ready(), last or Died("it was stopped")
        self.workers: list[StandIn] = []
        self.excluded: set[int] = set()
        self.closed = False

    def start(self, inbox: Any) -> StandIn | None:
        used = {worker.machine for worker in self.workers if not (worker.killed or worker.gone)}
        free = [one for one in range(self.machines) if one not in used | self.excluded]
        if not free:
            return None
        number = len(self.workers)
        worker = StandIn(f"worker {number}", free[0], inbox, self.react(number), self.last)
        self.workers.append(worker)
        inbox.put((worker, self.first))
        return worker

    def exclude(self, worker: Any) -> bool:
        self.excluded.add(worker.machine)
        return len(self.excluded) < self.machines

    def close(self) -> None:
        self.closed = True


class StandInStore:
    """The store's side: trials that had ended although their worker was lost, and those recorded as failed."""

    def __init__(self, ended: dict[str, Any] | None = None) -> None:
        self.ended, self.failed, self.lost = ended or {}, dict[str, str](), False

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("another command took the study over")

    def look(self, leg: Leg) -> Any:
        return self.ended.get(leg.trial.label, leg)

    def fail(self, leg: Leg, reason: str) -> TrialFailed:
        self.failed[leg.trial.label] = reason
        return TrialFailed(reason)


def dispatcher(
    pool: Any, rounds: Iterable[Sequence[Leg]], store: Any = None, *, size: int = 1, silence: float = 600.0
) -> Dispatcher:
    progress = StudyProgress(Console(quiet=True), 6)
    return Dispatcher(pool, rounds, progress, size=size, silence=silence, lost=store or StandInStore())


def labels(outcomes: Iterable[tuple[Leg, Any]]) -> list[str]:
    return sorted(leg.trial.label for leg, _ in outcomes)


def test_every_leg_is_run_once_and_workers_are_ended() -> None:
    pool, legs = StandInPool(3, lambda number: ends), legs_of()
    outcomes = list(dispatcher(pool, [legs]).run())
    assert labels(outcomes) == sorted(leg.trial.label for leg in legs)
    assert len(pool.workers) == 3
    assert pool.closed
    assert all(worker.stopped for worker in pool.workers)


def test_no_more_workers_than_groups_are_started() -> None:
    pool, legs = StandInPool(8, lambda number: ends), legs_of(4)
    list(dispatcher(pool, [legs], size=2).run())
    assert len(pool.workers) == 2
    assert sorted(len(group) for worker in pool.workers for group in worker.given) == [2, 2]


def test_a_lost_workers_leg_goes_to_another() -> None:
    def react(number: int) -> Reaction:
        return (lambda legs: [Died("SIGKILL")]) if number == 0 else ends

    pool, legs = StandInPool(4, react), legs_of()
    outcomes = list(dispatcher(pool, [legs]).run())
    assert labels(outcomes) == sorted(leg.trial.label for leg in legs)
    assert all(outcome is None for _, outcome in outcomes)


def test_a_leg_that_had_ended_before_its_worker_was_lost_is_not_run_again() -> None:
    legs = legs_of(2)
    first, second = (leg.trial.label for leg in legs)
    store = StandInStore({first: None, second: TrialFailed("non-finite")})
    pool = StandInPool(2, lambda number: lambda legs: [Died("SIGKILL")])
    outcomes = {leg.trial.label: outcome for leg, outcome in dispatcher(pool, [legs], store).run()}
    assert outcomes[first] is None
    assert str(outcomes[second]) == "non-finite"
    assert sum(len(worker.given) for worker in pool.workers) == 2


def test_a_lost_workers_leg_waits_for_a_tracking_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_lora.runner.engines.dispatch._TICK", 0.01)

    class Away(StandInStore):
        asked = 0

        def look(self, leg: Leg) -> Any:
            self.asked += 1
            if self.asked <= 3:
                raise TrackingError("no answer")
            return leg

    def react(number: int) -> Reaction:
        return (lambda legs: [Died("SIGKILL")]) if number == 0 else ends

    store = Away()
    [(_, outcome)] = dispatcher(StandInPool(2, react), [legs_of(1)], store).run()
    assert (outcome, store.asked) == (None, 4)
    monkeypatch.setattr("adaptive_lora.runner.engines.dispatch._OUTAGE", 0.05)
    store.asked = -1_000_000
    with pytest.raises(TrackingError, match="no answer"):
        list(dispatcher(StandInPool(2, react), [legs_of(1)], store).run())


def test_a_trial_that_takes_its_workers_with_it_fails_and_the_others_go_on() -> None:
    legs = legs_of(3)
    poison = legs[1].trial.label

    def react(given: Sequence[Leg]) -> list[Message]:
        return [Died("SIGSEGV")] if given[0].trial.label == poison else ends(given)

    store = StandInStore()
    pool = StandInPool(30, lambda number: react)
    outcomes = {leg.trial.label: outcome for leg, outcome in dispatcher(pool, [legs], store).run()}
    assert isinstance(outcomes.pop(poison), TrialFailed)
    assert "SIGSEGV" in store.failed[poison]
    assert set(outcomes.values()) == {None}
    assert sum(group[0].trial.label == poison for worker in pool.workers for group in worker.given) == MOST_DEATHS


def test_lost_nodes_do_not_count_against_a_trial() -> None:
    def react(number: int) -> Reaction:
        return (lambda legs: [Died("node left", lost_node=True)]) if number < MOST_DEATHS + 2 else ends

    pool, legs = StandInPool(30, react), legs_of(1)
    [(_, outcome)] = dispatcher(pool, [legs]).run()
    assert outcome is None


def test_a_machine_with_a_full_disk_is_left_out() -> None:
    told = TrackingError("results cannot be kept: No space left on device")
    told.__cause__ = OSError(28, "No space left on device")
    full = Broken.of(told)

    def react(number: int) -> Reaction:
        return (lambda legs: [full]) if number == 0 else ends

    pool, legs = StandInPool(2, react), legs_of()
    outcomes = list(dispatcher(pool, [legs]).run())
    assert labels(outcomes) == sorted(leg.trial.label for leg in legs)
    assert [worker.machine for worker in pool.workers] == [0, 1]
    with pytest.raises(TrackingError, match=r"worker 0: results .*No space left"):
        list(dispatcher(StandInPool(1, lambda number: lambda legs: [full]), [legs]).run())


def test_a_silent_worker_is_ended_and_its_leg_given_to_another() -> None:
    def react(number: int) -> Reaction:
        return (lambda legs: []) if number == 0 else ends

    pool, legs = StandInPool(2, react), legs_of(1)
    [(_, outcome)] = dispatcher(pool, [legs], silence=0.05).run()
    assert outcome is None
    assert pool.workers[0].killed


def test_records_that_a_worker_could_not_deliver_are_named_at_the_end() -> None:
    pool = StandInPool(1, lambda number: ends, last=Broken.of(Undelivered("records of 1 run are kept")))
    with pytest.raises(Undelivered, match="worker 0: records of 1 run are kept"):
        list(dispatcher(pool, [legs_of(1)]).run())


def test_errors_of_workers_are_raised_as_what_they_are() -> None:
    for error, kind, text in (
        (ConfigError("data on node2 differs"), ConfigError, "worker 0: data on node2 differs"),
        (AssertionError("a bug"), RuntimeError, "AssertionError: a bug"),
    ):
        pool = StandInPool(2, lambda number: ends, Broken.of(error))
        with pytest.raises(kind, match=text):
            list(dispatcher(pool, [legs_of()]).run())
        assert pool.closed


def test_workers_that_never_become_ready_end_the_study() -> None:
    pool = StandInPool(20, lambda number: ends, Died("exit code 1"))
    with pytest.raises(WorkerError, match="before they had loaded base and data"):
        list(dispatcher(pool, [legs_of()]).run())


def test_a_stop_lets_workers_write_checkpoints_and_a_lost_lease_does_not() -> None:
    def interrupted(legs: Sequence[Leg]) -> list[Message]:
        raise Interrupted(15)

    pool = StandInPool(2, lambda number: interrupted if number else lambda legs: [Alive()])
    with pytest.raises(Interrupted):
        list(dispatcher(pool, [legs_of()]).run())
    assert pool.workers[0].stopped
    store, pool = StandInStore(), StandInPool(2, lambda number: ends)
    store.lost = True
    with pytest.raises(LeaseLost):
        list(dispatcher(pool, [legs_of()], store).run())
    assert not any(worker.stopped for worker in pool.workers)


def test_a_race_is_asked_again_when_a_worker_has_nothing_to_do() -> None:
    """Legs that are in progress come again and are passed over."""
    legs = legs_of(2)
    labels = {leg.trial.label for leg in legs}
    ended: dict[str, list[int | None]] = {label: [] for label in labels}
    asked: list[int] = []

    def rounds() -> Iterable[Sequence[Leg]]:
        while left := [leg for leg in legs if None not in ended[leg.trial.label]]:
            asked.append(len(left))
            both = all(5 in ended[label] for label in labels)
            yield [dataclasses.replace(leg, pause_at=None if both else 5) for leg in left]

    def react(given: Sequence[Leg]) -> list[Message]:
        ended[given[0].trial.label].append(given[0].pause_at)
        return [Ended((LegEnd(paused=given[0].pause_at is not None),))]

    outcomes = list(dispatcher(StandInPool(2, lambda number: react), rounds()).run())
    assert sum(isinstance(outcome, TrainingPaused) for _, outcome in outcomes) == 2
    assert ended == {label: [5, None] for label in labels}
    assert len(asked) >= 2


def test_messages_reach_the_progress_display(caplog: pytest.LogCaptureFixture) -> None:
    def react(legs: Sequence[Leg]) -> list[Message]:
        return [Shown("begin", (legs[0].trial.label,)), Shown("warn", ("worker 0: a warning",)), *ends(legs)]

    with StudyProgress(Console(quiet=True), 1) as progress:
        pool = StandInPool(1, lambda number: react)
        list(Dispatcher(pool, [legs_of(1)], progress, size=1, silence=600, lost=StandInStore()).run())
    assert "worker 0: a warning" in caplog.text


def test_a_worker_keeps_to_the_base_and_profile_that_it_has() -> None:
    legs = legs_of(3, ["uniform", "empirical"])
    queue = LegQueue()
    for group in grouped(legs, 1):
        queue.add(group)
    first = queue.next(None, [])
    assert first[0].trial.label.startswith("uniform")
    profile = ("full", "weight_gradient", (), 0, 0)
    kinds = []
    while queue:
        group = queue.next(profile, [("full",)])
        kinds.append((group[0].trial.method.options.metric is not None, group[0].trial.seed))
    assert kinds[0] == (True, 0)
    assert len(kinds) == len(legs) - 1


def test_trials_in_progress_are_not_counted_as_finished() -> None:
    shown = StringIO()
    with StudyProgress(Console(file=shown, force_terminal=True, width=150), 6) as progress:
        for label in ("first", "second"):
            progress.begin(label)
            progress.step(label, StepEvent(step=9, total_steps=10, loss=1.0, tokens=9))
        progress.end("first", "done")
    assert set(re.findall(r"(\d)/6 trials", re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()))) == {"0", "1"}
