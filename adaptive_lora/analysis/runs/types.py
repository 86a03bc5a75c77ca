"""Runs made elsewhere, as every reader returns them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_lora.analysis.comparison import Outcome, Task
from adaptive_lora.errors import ConfigError
from adaptive_lora.results import TrialRecord

_ENDS = {
    True: "accuracy|acc|acc_norm|exact_match|f1|bleu|rouge[12l]|auc|auroc|mcc|reward|win_rate",
    False: "loss|nll|perplexity|ppl|error|error_rate|wer|cer|mse|mae|rmse",
}
"""Direction -> ends of names of scores that have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Runs of several methods with their scores, and what was read."""

    name: str
    """Name of the source, for the title."""
    records: tuple[TrialRecord, ...]
    """One per run and task; the task is its fold."""
    outcome: Outcome
    """Score that is compared; of several tasks, their mean."""
    tasks: Mapping[int, Task] = field(default_factory=dict)
    """Fold -> task; empty where there are no tasks."""
    baseline: str | None = None
    """Method that the others are compared with where none is named; None: it must be named."""
    lines: tuple[str, ...] = ()
    """How the runs were read, for people."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """Example id -> its text, where known."""


def direction(score: str, given: bool | None) -> bool:
    """Return whether more of a score is better.

    Args:
        score: its name.
        given: what the user said; None: by the end of its name, where that is certain.

    Raises:
        ConfigError: neither tells.
    """
    if given is not None:
        return given
    for higher, ends in _ENDS.items():
        if re.search(rf"(?:^|[^a-z0-9])(?:{ends})$", score.lower()):
            return higher
    raise ConfigError(
        f"score '{score}': required whether more of it is better, which its name does not tell; give "
        "--higher-is-better or --lower-is-better (in Python, higher_is_better=True or False)."
    )


def direction_text(outcome: Outcome) -> str:
    """Return "accuracy, higher is better"."""
    return f"{outcome.name}, {'higher' if outcome.higher_is_better else 'lower'} is better"
