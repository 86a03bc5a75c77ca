"""The frozen base's loss, and the margin that follows from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adaptive_lora.analysis.comparison.pairing import check_same_examples
from adaptive_lora.analysis.comparison.trials import Folds
from adaptive_lora.analysis.comparison.types import Margin
from adaptive_lora.analysis.comparison.wording import plain
from adaptive_lora.errors import DataError
from adaptive_lora.results import NATS_PER_TOKEN, EvalResult


def frozen_loss_of(
    base_scores: EvalResult | Mapping[int, EvalResult] | None, base: Mapping[int, Folds]
) -> float | None:
    """Return the frozen base's test loss, after checking that it saw the same examples."""
    if base_scores is None:
        return None
    trials = next(iter(base.values()))
    if isinstance(base_scores, EvalResult):
        ids = tuple(name for trial in trials if trial.test for name in trial.test.example_ids)
        check_same_examples(base_scores.example_ids, ids, "frozen base and baseline")
        return base_scores.loss
    missing = [trial.fold for trial in trials if trial.fold not in base_scores]
    if missing:
        raise DataError(f"scores of the frozen base are missing for fold {missing[0]}.")
    for trial in trials:
        if trial.test:
            names = f"frozen base and baseline, fold {trial.fold}"
            check_same_examples(base_scores[trial.fold].example_ids, trial.test.example_ids, names)
    return float(np.mean([base_scores[trial.fold].loss for trial in trials]))


def choose_margin(
    given: float | None, share: float, frozen_loss: float | None, base_loss: float, unit: str = NATS_PER_TOKEN
) -> Margin:
    """Return the margin.

    Args:
        given: what the user states, in the unit of the loss; it goes before the share.
        share: of what the baseline gains over the frozen base in test loss.
        frozen_loss: of the base without adapter, where known.
        base_loss: of the baseline.
        unit: what losses are counted in.

    Raises:
        DataError: not above 0.
    """
    if given is not None:
        if given <= 0:
            raise DataError(f"margin: required above 0 {unit}, got {given:g}.")
        return Margin(value=given, source=f"stated by the user, in {unit}")
    if frozen_loss is None:
        return Margin(
            value=None,
            source="no margin stated and no score of the frozen base to take one from: equivalence is not tested",
        )
    gain = frozen_loss - base_loss
    if gain <= 0:
        return Margin(
            value=None,
            source="the baseline gains nothing over the frozen base, so no margin follows from it: "
            "equivalence is not tested",
        )
    return Margin(
        value=share * gain,
        source=f"{100 * share:g} % of what the baseline gains over the frozen base "
        f"({plain(frozen_loss)} to {plain(base_loss)} {unit})",
    )
