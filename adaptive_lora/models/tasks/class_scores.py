"""Scores of classes over a split of the data, by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def class_scores(targets: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation coefficient.

    F1 is that of class 1 if there are only classes 0 and 1 (`f1`), and the unweighted mean over
    classes that occur (`f1_macro`). A class that is never predicted has F1 0.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    with warnings.catch_warnings():
        # With a single predicted class, Matthews' coefficient is 0 by convention.
        warnings.filterwarnings("ignore", ".*single label.*", UserWarning)
        scores = {
            "accuracy": float(accuracy_score(targets, predicted)),
            "f1_macro": float(f1_score(targets, predicted, average="macro", zero_division=0.0)),
            "matthews": float(matthews_corrcoef(targets, predicted)),
        }
    if set(targets) | set(predicted) <= {0, 1}:
        scores["f1"] = float(f1_score(targets, predicted, zero_division=0.0))
    return scores
