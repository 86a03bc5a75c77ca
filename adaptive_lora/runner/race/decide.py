"""The race of learning rates: decisions on how far trials are trained, by the losses in the store.

A decision is a function of the losses in the store and of the study's grid alone. So the order of trials
and the number of worker processes do not matter, and a study that is killed and continued ends like one
that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.analysis.stats import RaceRule, nearest_passes, standing
from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import ConfigError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.schedule import Leg, is_over
from adaptive_lora.tracking import Run, StudyRun
from adaptive_lora.tracking.runs import SIGNATURE, is_raced
from adaptive_lora.tracking.study_run import by_signature, rung_reached
from adaptive_lora.training import is_validated, total_steps

RACE = "race.json"
_CURVE, _TOKENS = "validation/loss", "train/tokens"
_AWAY = " A race decides by the losses in the store: run the same command again when it answers."


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """Decision at one rung of one method."""

    step: int
    """Optimiser step of the rung, in the first fold."""
    steps: int
    """Number of optimiser steps of the whole training."""
    losses: Mapping[float, float]
    """Learning rate -> mean validation loss over the racing seeds; infinite if all failed."""
    failed: Mapping[float, int]
    """Learning rate -> number of seeds that failed up to this rung."""
    seeds: int
    kept: tuple[float, ...]

    def reason(self, lr: float, rule: str) -> str:
        """Return the reason why a rate is stopped at this rung, with the rule."""
        best = min(self.kept, key=lambda kept: (self.failed[kept], self.losses[kept], kept))
        failed = f", {self.failed[lr]} of them failed" if self.failed[lr] else ""
        return (
            f"stopped at step {self.step} of {self.steps}: validation loss "
            f"{self.losses[lr]:.4f} there (mean of {self.seeds} seeds{failed}), "
            f"{self.losses[best]:.4f} at rate {best:g} ({rule})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; a loss that is not finite is None."""
        rates = [
            {"lr": lr, "validation_loss": loss if math.isfinite(loss) else None, "failed_seeds": self.failed[lr]}
            for lr, loss in sorted(self.losses.items())
        ]
        return {"step": self.step, "steps": self.steps, "seeds": self.seeds, "kept": list(self.kept), "rates": rates}


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRace:
    """State of the race of one method."""

    label: str
    left: tuple[float, ...]
    """Learning rates that were not stopped."""
    rungs: tuple[RungResult, ...]
    waiting: int | None
    """Index of the rung at which results are missing; None: all rungs are decided."""
    stopped: Mapping[float, str]
    """Learning rate -> reason why it was stopped."""


class Race:
    """The race of a study, by equal rules for all methods."""

    def __init__(self, context: StudyContext, study: StudyRun, rule: RaceRule) -> None:
        """Prepare a race without reading the store."""
        self._context, self._study, self._rule = context, study, rule
        self._racing = rule.racing(context.config.seeds)
        self._trials = {context.signature(trial): trial for trial in context.config.trials()}
        self._signatures = {key_of(trial): signature for signature, trial in self._trials.items()}
        self._curves: dict[tuple[str, str, int], dict[int, float]] = {}
        self.methods: tuple[MethodRace, ...] = ()
        """State of each method's race, set by `look`."""

    def look(self) -> tuple[list[Leg], list[TrialSpec]]:
        """Make all possible decisions, and end the trials of stopped rates.

        Returns:
            The parts of trials that can be trained now, and the stopped trials, in the order of the grid.

        Raises:
            TrackingError: the store does not answer, or has not received all records.
        """
        self._study.store.settle(_AWAY)
        runs = {signature: list[Run]() for signature in self._trials} | by_signature(self._study.children())
        before = self.methods
        self.methods = tuple(self._decided(spec, runs) for spec in self._context.config.specs)
        if self.methods != before:
            self._study.json(RACE, self.to_dict())
        races = {race.label: race for race in self.methods}
        legs: list[Leg] = []
        stopped: list[TrialSpec] = []
        ended: list[tuple[Run, str]] = []
        for signature, trial in self._trials.items():
            race, own = races[trial.method.label], runs[signature]
            if trial.lr in race.stopped and not is_over(own, frozenset()):
                stopped.append(trial)
                left = [run for run in own if run.info.status != "FAILED" and not is_raced(run)]
                ended += [(run, race.stopped[trial.lr]) for run in left]
            elif trial.lr in race.left and not is_over(own, self._study.failed_before):
                if race.waiting is None:
                    legs.append(Leg(trial=trial, earlier=own))
                elif trial.seed in self._racing and self._loss(trial, own, race.waiting) is None:
                    step = _rungs(self._context, trial.method, trial.fold)[race.waiting]
                    legs.append(Leg(trial=trial, earlier=own, pause_at=step))
        self._study.end_raced(ended)
        return legs, stopped

    def _decided(self, spec: MethodSpec, runs: Mapping[str, Sequence[Run]]) -> MethodRace:
        left, decided, waiting = tuple(sorted(spec.lr or self._context.config.lr)), [], None
        for number, step in enumerate(_rungs(self._context, spec, 0)):
            if len(left) == 1:
                break
            losses = self._losses(spec, left, number, runs)
            if losses is None:
                waiting = number
                break
            left = self._rule.survivors(losses, number)
            order = {lr: standing(losses, lr) for lr in losses}
            decided.append(
                RungResult(
                    step=step,
                    steps=_steps(self._context, spec, 0),
                    losses={lr: mean for lr, (_, mean, _) in order.items()},
                    failed={lr: failed for lr, (failed, _, _) in order.items()},
                    seeds=len(self._racing),
                    kept=left,
                )
            )
        reasons = {
            lr: rung.reason(lr, self._rule.text)
            for rung in decided
            for lr in sorted(rung.losses.keys() - set(rung.kept))
        }
        return MethodRace(label=spec.label, left=left, rungs=tuple(decided), waiting=waiting, stopped=reasons)

    def _losses(
        self, spec: MethodSpec, rates: Sequence[float], number: int, runs: Mapping[str, Sequence[Run]]
    ) -> dict[float, dict[int, float]] | None:
        """Return learning rate -> seed -> mean loss over folds at a rung; None if a trial has not reached it."""
        config = self._context.config
        found: dict[float, dict[int, float]] = {}
        for lr, seed in product(rates, self._racing):
            total = 0.0
            for fold in range(config.data.folds):
                trial = TrialSpec(config=config, method=spec, seed=seed, fold=fold, lr=lr)
                loss = self._loss(trial, runs[self._signatures[key_of(trial)]], number)
                if loss is None:
                    return None
                total += loss
            found.setdefault(lr, {})[seed] = total / config.data.folds
        return found

    def _loss(self, trial: TrialSpec, runs: Sequence[Run], number: int) -> float | None:
        """Return a trial's loss at a rung: infinite if it failed before, None if it has not reached it."""
        step = _rungs(self._context, trial.method, trial.fold)[number]
        ranks = {"FINISHED": 0, "FAILED": 2}
        for run in sorted(runs, key=lambda run: ranks.get(run.info.status, 1)):
            if run.info.status in ranks or rung_reached(run) >= step:
                one = _steps(self._context, trial.method, trial.fold) // trial.method.options.trainings
                begun = (step - 1) // one * one  # start of the same training, if there are several
                return loss_at(self._curve(run), step, since=begun if trial.config.train.patience else None)
        return None

    def _curve(self, run: Run) -> dict[int, float]:
        """Return step -> validation loss in the store."""
        key = (run.info.run_id, run.info.status, rung_reached(run))
        if key not in self._curves:
            points = self._study.store.client.get_metric_history(run.info.run_id, _CURVE)
            self._curves[key] = {point.step: point.value for point in points}
        return self._curves[key]

    def steps(self) -> tuple[int, int]:
        """Return the number of optimiser steps taken by all trials, and that of the full grid."""
        runs = [run for run in self._study.children() if run.data.tags.get(SIGNATURE) in self._trials]

        def last(run: Run) -> int:
            history = self._study.store.client.get_metric_history(run.info.run_id, _TOKENS)
            return max((point.step for point in history), default=0)

        taken: dict[str, int] = {}
        with ThreadPoolExecutor(max_workers=8) as workers:
            for run, step in zip(runs, workers.map(last, runs), strict=True):
                signature = run.data.tags[SIGNATURE]
                taken[signature] = max(step, taken.get(signature, 0))
        full = sum(_steps(self._context, trial.method, trial.fold) for trial in self._trials.values())
        return sum(taken.values()), full

    def to_dict(self) -> dict[str, Any]:
        """Return rule and decisions as JSON-ready values."""
        methods = {
            race.label: {"left": list(race.left), "rungs": [rung.to_dict() for rung in race.rungs]}
            for race in self.methods
        }
        return {"rule": self._rule.text, "methods": methods}


def key_of(trial: TrialSpec) -> tuple[str, int, int, float]:
    """Return the key of a trial within its study."""
    return trial.method.label, trial.seed, trial.fold, trial.lr


def require_rungs(context: StudyContext) -> None:
    """Refuse a study whose trainings are too short for a race, before anything is written.

    Raises:
        ConfigError: there is no validation pass before the end of training.
    """
    for spec in context.config.specs:
        if not _rungs(context, spec, 0):
            raise ConfigError(
                f"race: {spec.label} is trained for {_steps(context, spec, 0)} step, without a "
                "validation pass before its end; train longer, or leave --race out."
            )


def _steps(context: StudyContext, spec: MethodSpec, fold: int) -> int:
    """Return the number of optimiser steps of a trial."""
    trainings: int = spec.options.trainings
    return trainings * total_steps(len(context.splits(fold).train), context.config.train)


def _rungs(context: StudyContext, spec: MethodSpec, fold: int) -> tuple[int, ...]:
    """Return the steps at which a method's rates are compared."""
    one = _steps(context, spec, fold) // spec.options.trainings
    return rungs_of(one, context.config.train.validations, spec.options.trainings)


def rungs_of(steps: int, validations: int, trainings: int = 1) -> tuple[int, ...]:
    """Return the optimiser steps of the rungs.

    Args:
        steps: number of optimiser steps of one training.
        validations: number of validation passes in it.
        trainings: number of trainings of the method in sequence; steps are counted over all.
    """
    passes = [step for step in range(1, steps + 1) if is_validated(step, steps, validations)]
    through = [number * steps + step for number in range(trainings) for step in passes]
    return nearest_passes(tuple(through), trainings * steps)


def loss_at(curve: Mapping[int, float], step: int, *, since: int | None) -> float:
    """Return the validation loss at a step; infinite if none is recorded.

    Args:
        curve: step -> validation loss, without non-finite losses.
        step: step of the rung.
        since: with early stopping, which keeps the best weights: the best loss after this step
            counts, even if the trial ended before the rung. None: the loss at the rung alone.
    """
    if since is None:
        return curve.get(step, math.inf)
    return min((loss for at, loss in curve.items() if since < at <= step), default=math.inf)
