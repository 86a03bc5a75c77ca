"""Several trials at once on one frozen base: for GPUs, which one trial alone does not fill.

Every trial runs its own code from its run in the tracking store to its saved adapter, as if it were
alone, up to where training begins. There it waits until all of its group are as far; then their
steps are taken together, and each trial goes on by itself. So what a trial records does not depend
on the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed
from adaptive_lora.study.executors.serial import run_serially
from adaptive_lora.study.executors.turns import Seat
from adaptive_lora.training.joint.grouped import mount, take_off
from adaptive_lora.training.joint.loop import JointTraining, Member, joining_problem
from adaptive_lora.training.trainer import Runner, Trainer

RunTrial = Callable[[TrialSpec, Runner], object]
"""Runs a trial; how its course is run is given."""


def run_together(
    trials: Iterable[TrialSpec],
    run: RunTrial,
    on_failure: Callable[[TrialSpec, TrialFailed], None],
    *,
    size: Callable[[TrialSpec], int],
) -> None:
    """Run trials in groups; an unstable one is reported and the others go on.

    Trials that cannot be trained together run one after another among the others, and their reason
    is logged once.

    Args:
        trials: in order.
        run: runs one trial.
        on_failure: told of trials that failed.
        size: with how many others like it, itself included, a trial may train; 1: alone.
    """
    for group in _groups(trials, size):
        if len(group) == 1:
            run_serially(group, lambda trial: run(trial, Trainer.run), on_failure)
        else:
            _run_group(group, run, on_failure)


def _run_group(
    trials: Sequence[TrialSpec], run: RunTrial, on_failure: Callable[[TrialSpec, TrialFailed], None]
) -> None:
    named = {trial.label: trial for trial in trials}
    works = {label: partial(run, trial) for label, trial in named.items()}
    _Group(works, lambda label, failure: on_failure(named[label], failure)).run()


def train_together(trainings: Sequence[Callable[[Runner], object]]) -> None:
    """Run pieces of work that each train once, their trainings together.

    Raises:
        TrialFailed: one of them failed; the others ended before.
    """
    failures: list[TrialFailed] = []
    seats = {f"training {number}": work for number, work in enumerate(trainings)}
    _Group(seats, lambda name, failure: failures.append(failure)).run()
    if failures:
        raise failures[0]


def _groups(trials: Iterable[TrialSpec], size: Callable[[TrialSpec], int]) -> Iterable[Sequence[TrialSpec]]:
    """Yield trials in groups, in order; what must run alone does so at once."""
    group: list[TrialSpec] = []
    room = 0
    for trial in trials:
        most = size(trial)
        if most <= 1:
            yield [trial]
            continue
        room = min(room, most) if group else most
        if len(group) >= room:
            yield group
            group, room = [], most
        group.append(trial)
    if group:
        yield group


class _Group:
    """Work that goes to its trainings, through them, and from there to its end together."""

    def __init__(
        self, works: Mapping[str, Callable[[Runner], object]], on_failure: Callable[[str, TrialFailed], None]
    ) -> None:
        """Prepare a group: name -> work, which is given how to run its course."""
        self._on_failure = on_failure
        self._waiting: dict[Seat, Member] = {}
        self._said: set[str] = set()
        self._seats = {self._seat(name, work): name for name, work in works.items()}

    def run(self) -> None:
        """Run all to their ends, whatever happens: no thread is left behind."""
        try:
            for seat in self._seats:
                self._turn(seat)
            while self._waiting:
                members = list(self._waiting.values())
                JointTraining(members).run()
                for seat in list(self._waiting):
                    self._turn(seat, self._waiting.pop(seat).failure)
        except BaseException as error:
            stop = error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
            for seat in self._seats:
                if seat.begun and not seat.ended:
                    seat.turn(stop)
            raise

    def _seat(self, name: str, work: Callable[[Runner], object]) -> Seat:
        return Seat(lambda seat: work(self._runner(seat)), name)

    def _turn(self, seat: Seat, thrown: TrialFailed | None = None) -> None:
        seat.turn(thrown)
        if isinstance(seat.error, TrialFailed):
            self._on_failure(self._seats[seat], seat.error)
        elif seat.error is not None:
            raise seat.error

    def _runner(self, seat: Seat) -> Runner:
        """Return what runs a course in a seat's thread: with the others, or alone if it must."""

        def run(trainer: Trainer) -> None:
            problem = joining_problem(trainer)
            if problem is not None:
                if problem not in self._said:
                    self._said.add(problem)
                    logging.getLogger(__name__).warning("trials train one by one: %s", problem)
                trainer.run()
                return
            model: Any = trainer.model
            layers = take_off(model)
            member = self._waiting[seat] = Member(trainer=trainer, layers=layers)
            started = time.perf_counter()
            try:
                seat.pause()
            finally:
                mount(model.get_base_model(), layers)
            trainer.waited_seconds += time.perf_counter() - started - member.own_seconds

        return run
