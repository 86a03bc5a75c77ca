"""Headroom: the gain of known right ranks as a share of uniform's loss, and the share of it that methods recover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import Headroom, Recovery
from adaptive_lora.analysis.comparison.pairing import used_trials
from adaptive_lora.analysis.comparison.trials import loss_of
from adaptive_lora.analysis.comparison.types import Comparison, MethodSummary
from adaptive_lora.analysis.comparison.verdict import sentence
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.results import TrialRecord

SEPARATING = 0.25
"""Least share of uniform's loss that the planted ranks must gain for methods to be told apart."""


def headroom_of(comparison: Comparison, records: Sequence[TrialRecord], oracle: str) -> Headroom | None:
    """Return the headroom of a comparison, and the share of it that each method recovers.

    None where the planted ranks, the method `oracle`, could not be compared with the baseline.
    """
    known = comparison.method(oracle) if oracle in comparison.places else None
    if known is None or known.difference is None:
        return None
    trials = used_trials(comparison, records)
    losses = {seed: float(np.mean(found)) for seed, found in _losses(trials[comparison.baseline]).items()}
    gains = _gains(known)
    same = _ranks(trials[oracle]) == _ranks(trials[comparison.baseline])
    if same:
        share, interval = 0.0, Interval.missing("the planted ranks are those of the baseline")
    else:
        found, interval = stats.ratio_of_means(
            list(gains.values()), [losses[seed] for seed in gains], confidence=comparison.confidence
        )
        share = found or 0.0
    separates = share >= SEPARATING and interval.low is not None and interval.low > 0
    return Headroom(
        text=sentence(
            "headroom",
            share=share,
            interval=interval,
            same=same,
            separates=separates,
            least=SEPARATING,
            trials=len(gains),
            comparison=comparison,
        ),
        oracle=oracle,
        share=share,
        interval=interval,
        trials=len(gains),
        separates=separates,
        methods=tuple(
            _recovery(method, {} if same else gains, trials[method.label], comparison.confidence)
            for method in comparison.methods
            if method.difference is not None
        ),
    )


def _recovery(
    method: MethodSummary, known: Mapping[int, float], trials: Sequence[TrialRecord], confidence: float
) -> Recovery:
    """Return what a method recovers of the gains of the planted ranks, seed by seed."""
    own = _gains(method)
    shared = [seed for seed in known if seed in own]
    recovered, interval = None, Interval.missing("there is nothing to recover")
    if shared:
        recovered, interval = stats.ratio_of_means(
            [own[seed] for seed in shared], [known[seed] for seed in shared], confidence=confidence
        )
    costs = [cost for cost in map(_trainings, trials) if cost is not None]
    return Recovery(
        method=method.label,
        recovered=recovered,
        interval=interval,
        verdict=method.verdict.kind,
        trainings=float(np.mean(costs)) if costs else None,
    )


def _gains(method: MethodSummary) -> dict[int, float]:
    """Return seed -> gain over the baseline."""
    assert method.difference is not None
    return {s: -value for s, value in zip(method.difference.seeds, method.difference.values, strict=True)}


def _losses(trials: Sequence[TrialRecord]) -> dict[int, list[float]]:
    """Return seed -> test loss of each fold."""
    found: dict[int, list[float]] = {}
    for trial in trials:
        if (loss := loss_of(trial)) is not None:
            found.setdefault(trial.seed, []).append(loss)
    return found


def _ranks(trials: Sequence[TrialRecord]) -> dict[str, int]:
    """Return site -> rank of the first trial."""
    return {site["name"]: site["rank"] for site in trials[0].plan.get("sites", ())} if trials else {}


def _trainings(trial: TrialRecord) -> float | None:
    """Return the time of a trial's training, profile and search over that of its training."""
    seconds = [trial.metrics.get(name, 0.0) for name in ("train_seconds", "profile/seconds", "search_seconds")]
    return sum(seconds) / seconds[0] if seconds[0] > 0 else None
