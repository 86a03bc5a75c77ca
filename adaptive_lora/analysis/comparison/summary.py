"""One method on its own: scores over seeds, cost, failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.efficiency import early_rate
from adaptive_lora.analysis.comparison.trials import Folds, TrialTable, over_seeds, trained_parameters
from adaptive_lora.analysis.comparison.types import (
    LearningRate,
    MethodSummary,
    Parameters,
    SeedMean,
    Verdict,
    VerdictKind,
)
from adaptive_lora.results import TrialRecord


def describe(
    table: TrialTable,
    label: str,
    curve: tuple[LearningRate, ...],
    base: Mapping[int, Folds],
    confidence: float,
    seed: int,
) -> MethodSummary:
    """Return a method's summary, not yet compared with anything."""
    lr = next((rate.lr for rate in curve if rate.chosen), None)
    trials = table.seeds_at(label, lr)
    failures = tuple(failure for failure in table.failures if failure.method == label)
    scores = _scores(list(trials.values()), "no seed finished" if not trials else "")
    losses = [float(np.mean([r.test.loss for r in folds if r.test])) for folds in trials.values()]
    if losses:
        interval = stats.mean_interval(losses, confidence=confidence, seed=seed)
    else:
        interval = stats.Interval(low=None, high=None, method="none", note="no seed finished")
    return MethodSummary(
        label=label,
        lr=lr,
        rates=curve,
        seeds=tuple(trials),
        missing_seeds=tuple(seed for seed in table.seeds if seed not in trials),
        failures=failures,
        loss_interval=interval,
        parameters=_parameters(trials, base),
        difference=None,
        shared_rate=None,
        exact_match_difference=None,
        most_changed=(),
        early_rate=early_rate(trials, base, confidence, seed),
        further=_further(list(trials.values())),
        verdict=_alone(label == table.methods[0], bool(trials), len(failures)),
        **scores,
    )


def _alone(is_baseline: bool, finished: bool, failures: int) -> Verdict:
    if is_baseline:
        return Verdict(kind=VerdictKind.BASELINE, text="baseline: the others are compared with it.")
    reason = "no seed in common with the baseline" if finished else "no seed finished"
    if failures:
        reason += f", {failures} failed"
    return Verdict(kind=VerdictKind.NOT_COMPARED, text=f"not compared: {reason}.")


def _further(seeds: Sequence[Folds]) -> dict[str, SeedMean]:
    """Return other scores of the task by name; accuracy has a field of its own."""
    tests = [record.test for folds in seeds for record in folds if record.test is not None]
    names = dict.fromkeys(name for test in tests for name in test.others if name != "accuracy")

    def of(name: str) -> Callable[[TrialRecord], float | None]:
        return lambda record: None if record.test is None else record.test.others.get(name)

    return {name: over_seeds(seeds, of(name), "not scored") for name in names}


def _scores(seeds: Sequence[Folds], absent: str) -> dict[str, SeedMean]:
    """Return every score of `MethodSummary` that is a mean over seeds, by field name."""

    def metric(name: str) -> Callable[[TrialRecord], float | None]:
        def read(record: TrialRecord) -> float | None:
            value = record.metrics.get(name)
            return value if value is not None and math.isfinite(value) else None

        return read

    readers: dict[str, tuple[Callable[[TrialRecord], float | None], str]] = {
        "loss": (lambda r: r.test.loss if r.test else None, ""),
        "perplexity": (lambda r: r.test.perplexity if r.test else None, ""),
        "token_accuracy": (lambda r: r.test.token_accuracy if r.test else None, ""),
        "exact_match": (lambda r: r.test.exact_match if r.test else None, "not scored"),
    }
    for name in ("reduction_vs_full", "efficiency_ratio", "tokens_per_second", "train_seconds", "peak_memory_bytes"):
        readers[name] = (metric(name), "not recorded")
    readers["trained_parameters"] = (trained_parameters, "")
    readers["profile_stability"] = (metric("profile/stability"), "no profile measured")
    return {name: over_seeds(seeds, read, absent or missing) for name, (read, missing) in readers.items()}


def _parameters(trials: Mapping[int, Folds], base: Mapping[int, Folds]) -> Parameters:
    counts = [record.trainable_parameters for folds in trials.values() for record in folds]
    base_counts = [record.trainable_parameters for folds in base.values() for record in folds]
    if not counts:
        return Parameters(mean=None, least=None, most=None, difference=0.0, share=None)
    mean, base_mean = float(np.mean(counts)), float(np.mean(base_counts))
    return Parameters(
        mean=mean,
        least=min(counts),
        most=max(counts),
        difference=mean - base_mean,
        share=(mean - base_mean) / base_mean if base_mean else None,
    )
