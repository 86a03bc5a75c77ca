"""Trials sorted by method, rate, seed and fold: which count, which failed and why, which rate."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptive_lora.analysis.comparison.outcome import Outcome
from adaptive_lora.analysis.comparison.types import Failure, LearningRate, SeedMean
from adaptive_lora.errors import DataError, unknown_name
from adaptive_lora.results import NATS_PER_TOKEN, RACED_STATUS, TrialRecord

Folds = tuple[TrialRecord, ...]
"""The finished trials of one method, rate and seed: one per fold, in fold order."""
Reader = Callable[[TrialRecord], float | None]
"""Reads one number of a trial; None where it was not recorded."""


@dataclass(frozen=True, slots=True)
class TrialTable:
    """All trials of a study by method, rate and seed."""

    methods: tuple[str, ...]
    """Baseline first, then in the order in which the records name them."""
    seeds: tuple[int, ...]
    folds: tuple[int, ...]
    complete: Mapping[tuple[str, float | None], Mapping[int, Folds]]
    """(method, rate) -> seed -> trials, for seeds of which every fold finished."""
    failures: Mapping[str, Sequence[Failure]]
    """Method -> its failed trials."""
    rates: Mapping[str, tuple[float | None, ...]]
    """Every rate tried per method, also those of which all trials failed; one None where rates are not known."""
    trials: int
    """Number of records: finished, failed and stopped by a race."""
    raced: Mapping[tuple[str, float | None], str]
    """(method, rate) -> reason why a race stopped it; such a rate is never chosen or compared."""

    def seeds_at(self, method: str, lr: float | None) -> Mapping[int, Folds]:
        """Return the complete seeds of a method at a rate; empty where there are none."""
        return self.complete.get((method, lr), {})

    def records_at(self, method: str, lr: float | None) -> list[TrialRecord]:
        """Return the trials of those seeds, seed by seed and in fold order."""
        return [record for folds in self.seeds_at(method, lr).values() for record in folds]


def tabulate(records: Sequence[TrialRecord], baseline: str) -> TrialTable:
    """Sort trials; a failed trial that a later run repeated with success does not count.

    Raises:
        DataError: no records, no trial of the baseline, or two finished runs of one trial.
    """
    if not records:
        raise DataError("nothing to compare: required finished trials of a study, got none.")
    tried_rates: dict[str, set[float | None]] = defaultdict(set)
    for record in records:
        tried_rates[record.method].add(record.lr)
    labels = list(tried_rates)
    if baseline not in labels:
        raise DataError(unknown_name("baseline", baseline, labels))
    rates = {label: _sorted_rates(found) for label, found in tried_rates.items()}
    finished: dict[tuple[str, float | None, int, int], TrialRecord] = {}
    broken: list[tuple[TrialRecord, str]] = []
    raced = {(r.method, r.lr): r.reason for r in records if r.status == RACED_STATUS}
    for record in records:
        key = (record.method, record.lr, record.seed, record.fold)
        if record.status == RACED_STATUS:
            continue
        if problem := _problem(record, needs_validation=len(rates[record.method]) > 1):
            broken.append((record, problem))
        elif key in finished:
            raise DataError(
                f"two finished runs of one trial ({record.method}, seed {record.seed}, fold {record.fold}, "
                f"lr {rate_text(record.lr)}): {finished[key].run_id} and {record.run_id}; "
                "delete one or compare one study at a time."
            )
        else:
            finished[key] = record
    folds = tuple(sorted({record.fold for record in records}))
    seeds = tuple(sorted({record.seed for record in records}))
    complete: dict[tuple[str, float | None], dict[int, Folds]] = {}
    tried = [(label, lr) for label in labels for lr in rates[label] if (label, lr) not in raced]
    for (label, lr), seed in itertools.product(tried, seeds):
        present = tuple(finished[label, lr, seed, fold] for fold in folds if (label, lr, seed, fold) in finished)
        if len(present) == len(folds):
            complete.setdefault((label, lr), {})[seed] = present
    failures: dict[str, list[Failure]] = defaultdict(list)
    for r, reason in broken:
        if (r.method, r.lr, r.seed, r.fold) not in finished:
            failures[r.method].append(
                Failure(run_id=r.run_id, method=r.method, seed=r.seed, fold=r.fold, lr=r.lr, reason=reason)
            )
    ordered = (baseline, *(label for label in labels if label != baseline))
    return TrialTable(ordered, seeds, folds, complete, failures, rates, len(records), raced)


def _sorted_rates(rates: set[float | None]) -> tuple[float | None, ...]:
    return tuple(sorted(rates, key=lambda lr: (lr is not None, lr or 0.0)))


def rate_text(lr: float | None) -> str:
    """Return a learning rate in few digits, or "not known"."""
    return "not known" if lr is None else f"{lr:g}"


def unit_of(records: Sequence[TrialRecord]) -> str:
    """Return the unit of the test losses of all trials.

    Raises:
        DataError: trials of different tasks.
    """
    units = sorted({record.test.unit for record in records if record.test is not None})
    if len(units) > 1:
        raise DataError(f"test losses in {' and in '.join(units)} cannot be compared; required trials of one task.")
    return units[0] if units else NATS_PER_TOKEN


def _problem(record: TrialRecord, *, needs_validation: bool) -> str:
    """Return why a trial gives no scores, or ''."""
    if record.status != "FINISHED":
        return record.reason or f"status {record.status}; no reason recorded"
    if record.test is None or record.test.tokens_E.sum() == 0:
        return "finished without scores on the test part"
    if not math.isfinite(record.test.loss):
        return "test loss is not finite"
    if needs_validation and not math.isfinite(record.validation_loss):
        return "validation loss is not finite, so its learning rate cannot be chosen"
    return ""


def per_seed(seeds: Mapping[int, Folds], read: Reader) -> dict[int, float]:
    """Return seed -> mean over folds, for seeds of which every fold has the value."""
    read_folds = {seed: [value for value in map(read, folds) if value is not None] for seed, folds in seeds.items()}
    return {seed: float(np.mean(values)) for seed, values in read_folds.items() if len(values) == len(seeds[seed])}


def over_seeds(seeds: Mapping[int, Folds], read: Reader, absent: str) -> SeedMean:
    """Summarise a value: mean over folds within a seed, then mean and standard deviation over seeds.

    Args:
        seeds: complete seeds.
        read: reads the value of one trial; None where it was not recorded.
        absent: the note where no trial has it.
    """
    values = list(per_seed(seeds, read).values())
    if not values:
        return SeedMean(mean=None, sd=None, seeds=0, note=absent)
    if not np.isfinite(values).all():
        return SeedMean(mean=None, sd=None, seeds=len(values), note="too large for a number")
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    note = "one seed has no standard deviation" if sd is None else ""
    if len(values) < len(seeds):
        note = "missing in some trials"
    return SeedMean(mean=float(np.mean(values)), sd=sd, seeds=len(values), note=note)


def loss_of(record: TrialRecord) -> float | None:
    """Return the test loss; None where a trial has no scores."""
    return None if record.test is None else record.test.loss


def metric(name: str) -> Reader:
    """Return the reader of a metric; None where it was not recorded or is not finite."""

    def read(record: TrialRecord) -> float | None:
        value = record.metrics.get(name, math.nan)
        return value if math.isfinite(value) else None

    return read


def served_parameters(record: TrialRecord) -> float | None:
    """Return the parameters of the adapter; None where they are not known."""
    return None if record.trainable_parameters is None else float(record.trainable_parameters)


def trained_parameters(record: TrialRecord) -> float | None:
    """Return the parameters that were trained; methods that prune record them beside the served."""
    trained = record.metrics.get("training_parameters")
    return served_parameters(record) if trained is None else float(trained)


def choose_rate(
    table: TrialTable, method: str, outcome: Outcome, among: Collection[int] | None = None
) -> tuple[LearningRate, ...]:
    """Return the learning-rate curve of a method with the chosen rate marked.

    The rate with the best mean validation loss wins, among those that finished for the most
    seeds, so that a rate cannot win by failing where it would have done badly; the lower rate on
    a tie. Test scores play no part.

    Args:
        table: the trials.
        method: label of the method.
        outcome: the number that is compared.
        among: seeds that choose, and that the curve is over; None: all.
    """
    curve = []
    for lr in table.rates[method]:
        raced = table.raced.get((method, lr), "")
        seeds = {seed: one for seed, one in table.seeds_at(method, lr).items() if among is None or seed in among}
        none = "stopped by the race" if (method, lr) in table.raced else "no seed finished"
        validation = over_seeds(
            seeds,
            lambda r: r.validation_loss if math.isfinite(r.validation_loss) else None,
            "no validation loss recorded" if seeds else none,
        )
        test = over_seeds(seeds, loss_of, none)
        curve.append(LearningRate(lr=lr, validation=validation, test=test, chosen=False, raced=raced))
    most = max(rate.test.seeds for rate in curve)
    able = [rate for rate in curve if rate.test.seeds == most > 0]

    def order(rate: LearningRate) -> tuple[float, float]:
        mean = rate.validation.mean
        return math.inf if mean is None else outcome.sign * mean, rate.lr or 0.0

    best = min(able, key=order, default=None)
    return tuple(replace(rate, chosen=rate is best) for rate in curve)
