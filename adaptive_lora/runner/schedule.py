"""The order in which the trials of a study are run: one after another, or in groups trained together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import TrialSpec
from adaptive_lora.models.device import Runtime

MOST_TOGETHER = 16
"""Maximum number of trials trained together in one process; fewer per forward pass if memory is short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """A trial, or a part of it, that can be run now."""

    trial: TrialSpec
    pause_at: int | None = None
    """Optimiser step of the rung at which it is paused for the other rates; None: to its end."""


class Schedule:
    """Legs in the order in which they are run, in groups: of one leg, or of several to be trained together.

    A leg that another process runs comes again after the others of its round, until it is done or that
    process has died.
    """

    def __init__(self, rounds: Iterable[Sequence[Leg]], *, engine: str, wait: Callable[[int], None]) -> None:
        """Prepare a schedule.

        Args:
            rounds: legs, in order; a round begins when all legs of the one before are done.
            engine: serial or together.
            wait: function called with the number of legs that other processes run, before they come again.
        """
        self._rounds, self._together, self._wait = rounds, engine == "together", wait
        self._postponed: list[Leg] = []

    def __iter__(self) -> Iterator[Sequence[Leg]]:
        """Yield the groups of all rounds."""
        for legs in self._rounds:
            left = list(legs)
            while left:
                yield from self._groups(left)
                left, self._postponed = self._postponed, []
                if left:
                    self._wait(len(left))

    def postpone(self, leg: Leg) -> None:
        """Yield a leg again later, because another process runs it."""
        self._postponed.append(leg)

    def _groups(self, legs: Iterable[Leg]) -> Iterator[Sequence[Leg]]:
        """Yield groups of at most `MOST_TOGETHER` legs, in order; those that must run alone are yielded at once."""
        group: list[Leg] = []
        for leg in legs:
            if not (self._together and _joins(leg.trial)):
                yield [leg]
                continue
            if len(group) == MOST_TOGETHER:
                yield group
                group = []
            group.append(leg)
        if group:
            yield group


def _joins(trial: TrialSpec) -> bool:
    """Return whether a trial can be trained together with others on one base."""
    return trial.method.options.is_plain_lora and trial.method.base == BaseStorage.FULL


def resolve_engine(engine: str, runtime: Runtime) -> str:
    """Return serial or together for `auto`.

    Trials together use a GPU fully, which one trial's small batch does not; on a CPU the matrix
    products of one trial already use all cores.
    """
    if engine != "auto":
        return engine
    return "together" if runtime.device.type == "cuda" else "serial"
