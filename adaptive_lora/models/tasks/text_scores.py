"""Scores of generated text beyond the loss per token: ROUGE, chrF, final answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from adaptive_lora.models.tasks.tokens import rouge
from adaptive_lora.results import FloatArray

MARK = "####"
"""Mark before the final answer in GSM8K (Cobbe et al. 2021, 2110.14168)."""
_ANSWER = re.compile(MARK + r"\s*(?P<number>[-+]?\$?\s*[-+]?[\d.,]*\d)")


def text_scores(texts: Sequence[str], examples: Sequence[Any]) -> dict[str, FloatArray]:
    """Return ROUGE and chrF of each example, and whether its final answer is right, if it has one."""
    found = {**rouge(texts, examples), "chrf": chrf(texts, examples)}
    answers = answer_matches(texts, examples)
    return found if answers is None else {**found, "answer": answers}


def chrf(texts: Sequence[str], examples: Sequence[Any]) -> FloatArray:
    """Return chrF (Popović 2015: F2 of character n-grams to length 6) in 0 to 1, by sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    pairs = zip(texts, examples, strict=True)
    return np.array([metric.sentence_score(t, [e.response]).score / 100 for t, e in pairs])


def answer_matches(texts: Sequence[str], examples: Sequence[Any]) -> FloatArray | None:
    """Return 1 where the number after the last `####` is the reference's, else 0.

    A text without a final answer is wrong. None if a reference has none, as in other tasks.
    """
    wanted = [final_answer(example.response) for example in examples]
    if any(answer is None for answer in wanted):
        return None
    pairs = zip(texts, wanted, strict=True)
    return np.array([float(final_answer(text) == answer) for text, answer in pairs])


def final_answer(text: str) -> Decimal | None:
    """Return the number after the last `####`, without currency and thousands symbols, or None."""
    matches = list(_ANSWER.finditer(text))
    if not matches:
        return None
    try:
        return Decimal(re.sub(r"[$,\s]", "", matches[-1]["number"]))
    except InvalidOperation:
        return None
