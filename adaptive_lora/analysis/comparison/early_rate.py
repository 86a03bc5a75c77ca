"""How soon a method is as good as the baseline ends."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import EarlyRate
from adaptive_lora.analysis.comparison.trials import Folds
from adaptive_lora.analysis.comparison.wording import joined
from adaptive_lora.analysis.stats import Interval


def early_rate(
    trials: Mapping[int, Folds], base: Mapping[int, Folds], confidence: float, seed: int
) -> EarlyRate | None:
    """Return the tokens to the baseline's final loss; None where no curve was recorded."""
    tokens: list[float | None] = []
    shares: list[float] = []
    missed = []
    for one in sorted(set(trials) & set(base)):
        pairs = list(zip(trials[one], base[one], strict=True))
        if not all(mine.validation_tokens and theirs.validation_tokens for mine, theirs in pairs):
            continue
        reached = [
            stats.first_reached(
                mine.validation_tokens, [loss for _, loss in mine.validation_curve], theirs.validation_loss
            )
            for mine, theirs in pairs
        ]
        known = [value for value in reached if value is not None]
        if len(known) < len(reached):
            tokens.append(None)
            missed.append(str(one))
            continue
        tokens.append(float(np.mean(known)))
        totals = [theirs.validation_tokens[-1] for _, theirs in pairs]
        shares.append(float(np.mean([k / total for k, total in zip(known, totals, strict=True)])))
    if not tokens:
        return None
    complete = not missed
    note = "" if complete else f"not reached under seed {joined(missed)}"
    if complete:
        interval = stats.mean_interval(shares, confidence=confidence, seed=seed)
    else:
        interval = Interval(low=None, high=None, method="none", note=note)
    return EarlyRate(
        reached=len(shares),
        seeds=len(tokens),
        tokens=float(np.mean([t for t in tokens if t is not None])) if complete else None,
        share=float(np.mean(shares)) if complete else None,
        interval=interval,
        note=note,
    )
