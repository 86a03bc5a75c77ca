"""The dispatcher: hands legs of trials to worker processes, and replaces workers that die or hang.

Only this process decides who runs what, so that no two workers run one trial. A leg whose worker is lost is given to
another one, which continues from the trial's last checkpoint.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adaptive_lora.errors import LeaseLost, TrackingError, TrialFailed, WorkerError
from adaptive_lora.interruption import TrainingPaused
from adaptive_lora.redaction import shown
from adaptive_lora.runner.engines.lost import LostLegs
from adaptive_lora.runner.engines.messages import Alive, Assignment, Broken, Died, Ended, LegEnd, Message, Ready, Shown
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.schedule import Leg, grouped

log = logging.getLogger(__name__)

MOST_DEATHS = 3
"""Number of workers that a trial may take with it before it counts as failed."""
_OUTAGE = 300.0
"""Seconds for which lost legs wait for a tracking server that is away when there is nothing else to do."""
_LOADING = 1800.0
"""Least seconds that a worker has to load base and data, of which it gives no sign."""
_TICK = 1.0
"""Maximum seconds between two checks for hanging workers and for room for new ones."""
_GRACE = 90.0
"""Seconds that workers have to write checkpoints and deliver records when the study ends or is stopped."""

Affinity = tuple[Any, ...]
LegOutcome = TrialFailed | TrainingPaused | None
"""How a leg ended; None: its trial is finished."""


class WorkerHandle(Protocol):
    """A worker process, seen from the study's process."""

    name: str
    """Name for messages, with its machine."""

    def assign(self, assignment: Assignment) -> None:
        """Give it a group of legs."""

    def stop(self) -> None:
        """Ask it to end: a trial in progress writes a checkpoint first."""

    def kill(self) -> None:
        """End its process at once."""


Inbox = queue.SimpleQueue[tuple[WorkerHandle, Message]]
"""Messages of all workers in the order of their arrival."""


class Pool(Protocol):
    """Place where workers run."""

    uses_gpus: bool
    """Use of GPUs by the workers."""
    description: str
    """Number and resources of the workers in words."""

    def start(self, inbox: Inbox) -> WorkerHandle | None:
        """Start one more worker, whose messages go to `inbox`; None if there is no room."""

    def exclude(self, worker: WorkerHandle) -> bool:
        """Start no more workers on a worker's machine; return whether there is another machine."""

    def close(self) -> None:
        """Give everything back; all workers have ended or been killed."""


class LegQueue:
    """Groups of legs that wait, by what a worker needs for them."""

    def __init__(self) -> None:
        self._waiting: dict[Affinity, deque[tuple[Leg, ...]]] = {}

    def __len__(self) -> int:
        """Return the number of groups."""
        return sum(map(len, self._waiting.values()))

    def add(self, group: Sequence[Leg], *, first: bool = False) -> None:
        """Add a group, behind or before those of its kind."""
        waiting = self._waiting.setdefault(_affinity(group), deque())
        (waiting.appendleft if first else waiting.append)(tuple(group))

    def next(self, last: Affinity | None, held: Iterable[Affinity]) -> tuple[Leg, ...]:
        """Remove and return the group to run next on a worker.

        Args:
            last: kind of the group that the worker ran last, whose base and profile it has; None: a new worker.
            held: kinds of the groups that other workers run.
        """
        others = set(held)

        def cost(kind: Affinity) -> tuple[bool, bool, bool]:
            return kind != last, last is not None and kind[0] != last[0], len(kind) > 1 and kind in others

        best = min(self._waiting, key=cost)
        group = self._waiting[best].popleft()
        if not self._waiting[best]:
            del self._waiting[best]
        return group


def _affinity(group: Sequence[Leg]) -> Affinity:
    """Return what a worker loads or measures for a group and keeps: the base, and the profile if there is one."""
    trial = group[0].trial
    metric = trial.method.options.metric
    return (trial.method.base,) if metric is None else (
        trial.method.base, metric, trial.method.profiled_on, trial.seed, trial.fold,
    )  # fmt: skip


@dataclass(kw_only=True)
class _Seat:
    """State of a worker."""

    worker: WorkerHandle
    group: tuple[Leg, ...] = ()
    """Legs that it runs."""
    ready: bool = False
    last: Affinity | None = None
    sign: float = field(default_factory=time.monotonic)
    """Time of its last message."""


class Dispatcher:
    """Gives the legs of a study to the workers of a pool."""

    def __init__(
        self,
        pool: Pool,
        rounds: Iterable[Sequence[Leg]],
        progress: StudyProgress,
        *,
        size: int,
        silence: float,
        lost: LostLegs,
    ) -> None:
        """Prepare a dispatcher; no worker is started.

        Args:
            pool: place where workers run.
            rounds: legs that can be run now. The next are asked for when a worker has nothing to do; legs in
                progress may come again and are passed over.
            progress: progress display.
            size: maximum number of trials that a worker trains together.
            silence: seconds without a message after which a worker is replaced.
            lost: what the store has of legs whose worker was lost.
        """
        self._pool, self._rounds, self._progress = pool, iter(rounds), progress
        self._size, self._silence, self._lost = size, silence, lost
        self._inbox: Inbox = queue.SimpleQueue()
        self._queue, self._seats = LegQueue(), dict[WorkerHandle, _Seat]()
        self._busy = dict[str, Leg]()
        """Label of a trial -> its leg that waits or runs."""
        self._deaths = dict[str, int]()
        self._unknown = list[tuple[Leg, str]]()
        """Legs of lost workers, with the reason, that the store has not been asked for yet."""
        self._asked = self._away_since = 0.0
        self._early_deaths, self._looked = 0, 0.0
        self._over = False

    def run(self) -> Iterator[tuple[Leg, LegOutcome]]:
        """Yield every leg with its outcome, in the order in which they end.

        Raises:
            AdaptiveLoraError: a worker cannot work for this study, or no machine is left.
        """
        try:
            self._refill()
            while self._busy or not self._over:
                self._lost.check()
                self._staff()
                yield from self._ended()
                self._replace_silent()
                yield from self._given_back()
                if not (self._queue or self._unknown):
                    self._refill()
            for worker, error in self._stop():
                raise error.raised(worker.name)
        except LeaseLost:
            raise  # the trials are another command's now; their workers are ended at once
        except BaseException:
            self._stop()
            raise
        finally:
            for worker in list(self._seats):
                worker.kill()
            self._pool.close()

    def _refill(self) -> None:
        """Ask for further legs."""
        if self._over:
            return
        legs = next(self._rounds, None)
        if legs is None:
            self._over = True
            return
        fresh = [leg for leg in legs if leg.trial.label not in self._busy]
        self._busy |= {leg.trial.label: leg for leg in fresh}
        for group in grouped(fresh, self._size):
            self._queue.add(group)

    def _staff(self) -> None:
        """Give idle workers something to do, and start further ones where there is room."""
        for seat in self._seats.values():
            if self._queue and seat.ready and not seat.group:
                held = [other.last for other in self._seats.values() if other.group and other.last]
                seat.group = self._queue.next(seat.last, held)
                seat.last, seat.sign = _affinity(seat.group), time.monotonic()
                seat.worker.assign(Assignment(seat.group))
        starting = sum(not seat.ready for seat in self._seats.values())
        while len(self._queue) > starting and (worker := self._pool.start(self._inbox)) is not None:
            self._seats[worker] = _Seat(worker=worker)
            starting += 1
        if not self._seats and self._queue:
            self._progress.wait_for_room()

    def _ended(self) -> Iterator[tuple[Leg, LegOutcome]]:
        """Wait for a message and handle it; yield the legs that have ended."""
        try:
            worker, message = self._inbox.get(timeout=_TICK)
        except queue.Empty:
            return
        seat = self._seats.get(worker)
        if seat is None:  # killed before
            return
        seat.sign = time.monotonic()
        match message:
            case Ready():
                seat.ready, self._early_deaths = True, 0
            case Shown(method="warn"):
                log.warning(*message.arguments)
            case Shown():
                getattr(self._progress, message.method)(*message.arguments)
            case Ended():
                legs, seat.group = seat.group, ()
                for leg, end in zip(legs, message.outcomes, strict=True):
                    del self._busy[leg.trial.label]
                    self._deaths.pop(leg.trial.label, None)
                    yield leg, _outcome(end)
            case Broken():
                del self._seats[worker]
                worker.kill()
                if not (message.local and self._pool.exclude(worker)):
                    raise message.raised(worker.name)
                self._note(worker, f"{message.kind}: {message.text}; its machine is no longer used")
                self._return(seat)
            case Died():
                del self._seats[worker]
                self._after_death(seat, message)
            case Alive():
                pass

    def _replace_silent(self) -> None:
        now = time.monotonic()
        if now - self._looked < _TICK:
            return
        self._looked = now
        for worker, seat in list(self._seats.items()):
            silence = self._silence if seat.ready else max(self._silence, _LOADING)
            if (seat.group or not seat.ready) and now - seat.sign > silence:
                del self._seats[worker]
                worker.kill()
                self._after_death(seat, Died(f"no sign of life for {now - seat.sign:.0f} s, so it was ended"))

    def _after_death(self, seat: _Seat, death: Died) -> None:
        """Give the legs of a lost worker back.

        Raises:
            WorkerError: workers end before they have loaded the study.
        """
        if not (seat.ready or death.lost_node):
            self._early_deaths += 1
            if self._early_deaths == MOST_DEATHS:
                raise WorkerError(
                    f"{MOST_DEATHS} worker processes ended before they had loaded base and data; the last one, "
                    f"{seat.worker.name}: {death.reason}. Too little memory for one base per worker is a common cause: "
                    "use fewer --workers."
                )
        self._note(seat.worker, death.reason)
        for leg in seat.group:
            self._deaths[leg.trial.label] = self._deaths.get(leg.trial.label, 0) + (not death.lost_node)
        self._return(seat, death.reason)

    def _return(self, seat: _Seat, reason: str = "") -> None:
        """Keep the legs of a lost worker until it is known what the store has of them."""
        self._unknown += [(leg, reason) for leg in seat.group]
        seat.group = ()

    def _given_back(self) -> Iterator[tuple[Leg, LegOutcome]]:
        """Put legs of lost workers back before all others, each alone; yield those that have ended or lost too many.

        They wait while the tracking server is away, as long as other workers have something to do.

        Raises:
            TrackingError: nothing else is left to do, and the server has been away for minutes.
        """
        while self._unknown and time.monotonic() >= self._asked + _TICK:
            leg, reason = self._unknown[-1]
            try:
                found = self._lost.look(leg)
            except LeaseLost:
                raise
            except TrackingError:
                self._asked = time.monotonic()
                self._away_since = self._away_since or self._asked
                others = self._queue or any(seat.group for seat in self._seats.values())
                if not others and self._asked - self._away_since > _OUTAGE:
                    raise
                return
            self._unknown.pop()
            self._asked = self._away_since = 0.0
            label = leg.trial.label
            if isinstance(found, Leg) and self._deaths.get(label, 0) < MOST_DEATHS:
                self._queue.add([found], first=True)
                continue
            if isinstance(found, Leg):
                found = self._lost.fail(
                    found, f"{MOST_DEATHS} worker processes ended while they ran it; the last: {reason}"
                )
            del self._busy[label]
            yield leg, found

    def _note(self, worker: WorkerHandle, text: str) -> None:
        self._progress.note(f"[yellow]{shown(worker.name)}[/]: {shown(text)}")

    def _stop(self) -> list[tuple[WorkerHandle, Broken]]:
        """Stop all workers, which write checkpoints and deliver their records; return the errors of some."""
        for worker, seat in list(self._seats.items()):
            if seat.ready:
                worker.stop()
            else:
                del self._seats[worker]
                worker.kill()
        until, errors = time.monotonic() + _GRACE, list[tuple[WorkerHandle, Broken]]()
        while self._seats and (left := until - time.monotonic()) > 0:
            try:
                worker, message = self._inbox.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(message, Died | Broken):
                self._seats.pop(worker, None)
            if isinstance(message, Broken):
                errors.append((worker, message))
        return errors


def _outcome(end: LegEnd) -> LegOutcome:
    if end.failure:
        return TrialFailed(end.failure)
    return TrainingPaused() if end.paused else None
