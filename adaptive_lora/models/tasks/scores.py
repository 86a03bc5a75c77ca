"""Scores of classes, numbers, tokens and generated texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import torch

from adaptive_lora.data.batches import IGNORED
from adaptive_lora.models.losses import token_losses
from adaptive_lora.results import FloatArray

MARK = "####"
"""Mark before the final answer in GSM8K (Cobbe et al. 2021, 2110.14168)."""
_ANSWER = re.compile(MARK + r"\s*(?P<number>[-+]?\$?\s*[-+]?[\d.,]*\d)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleScores:
    """Scores of a batch's B examples."""

    nll: torch.Tensor
    """Loss summed over the example's supervised tokens, or other targets of its task, shape (B,)."""
    units: torch.Tensor
    """Number of these targets, shape (B,)."""
    correct: torch.Tensor | None
    """Number of targets predicted right, shape (B,); None for tasks without right predictions."""
    further: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name -> further scores, shape (B,)."""

    def cpu(self) -> ExampleScores:
        """Return the scores on the CPU."""
        return ExampleScores(
            nll=self.nll.cpu(),
            units=self.units.cpu(),
            correct=None if self.correct is None else self.correct.cpu(),
            further={name: values.cpu() for name, values in self.further.items()},
        )


def token_example_scores(logits: torch.Tensor, targets: torch.Tensor) -> ExampleScores:
    """Return the scores of B examples from (B, T, V) logits and (B, T) targets."""
    supervised = targets != IGNORED
    hits = (logits.argmax(dim=-1) == targets) & supervised
    return ExampleScores(
        nll=token_losses(logits, targets).double().sum(dim=1), units=supervised.sum(dim=1), correct=hits.sum(dim=1)
    )


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


def correlations(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; empty where one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(targets) < 2 or np.ptp(targets) == 0 or np.ptp(predicted) == 0:
        return {}
    return {
        "pearson": float(pearsonr(targets, predicted).statistic),
        "spearman": float(spearmanr(targets, predicted).statistic),
    }


def exact(
    texts: Sequence[str], examples: Sequence[Any], tokenizer: Any, answers: Iterable[Sequence[int]]
) -> FloatArray:
    """Return 1 where a text equals the response, ignoring white space at both ends, else 0.

    The response as decoded from its tokens (`answers`) counts as well, unless it was cut: a tokenizer
    without case or line breaks, or with tokens left out of texts, cannot produce any other text.
    """

    def written(example: Any, ids: Sequence[int]) -> str | None:
        if example.cut:
            return None
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    return np.array(
        [
            float(text.strip() == each.response.strip() or text.strip() == written(each, ids))
            for text, each, ids in zip(texts, examples, answers, strict=True)
        ]
    )


def text_scores(texts: Sequence[str], examples: Sequence[Any]) -> dict[str, FloatArray]:
    """Return ROUGE and chrF of each example, and whether its final answer is right, if it has one."""
    found = {**rouge(texts, examples), "chrf": chrf(texts, examples)}
    answers = answer_matches(texts, examples)
    return found if answers is None else {**found, "answer": answers}


def rouge(texts: Sequence[str], examples: Sequence[Any]) -> dict[str, FloatArray]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (F measure, Lin 2004) of each example, without stemming.

    By Google's rouge-score, whose words are runs of a-z and 0-9, so that it does not apply to other
    scripts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names), use_stemmer=False)
    found = [scorer.score(e.response, text) for text, e in zip(texts, examples, strict=True)]
    return {shown: np.array([each[name].fmeasure for each in found]) for name, shown in names.items()}


def chrf(texts: Sequence[str], examples: Sequence[Any]) -> FloatArray:
    """Return chrF (Popović 2015: F2 of character n-grams to length 6) in 0 to 1, by sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    pairs = zip(texts, examples, strict=True)
    return np.array([metric.sentence_score(t, [e.response]).score / 100 for t, e in pairs])


@dataclass(frozen=True, kw_only=True, slots=True)
class WordErrors:
    """Errors of transcripts against their references, by jiwer: substitutions, deletions and insertions."""

    rates: FloatArray
    """Word errors of each transcript over the words of its reference."""
    overall: Mapping[str, float]
    """Errors over the units of all references: `wer` of words, `cer` of characters, and `wer_normalised` of words
    without case and punctuation, where a reference has any."""


def word_errors(texts: Sequence[str], examples: Sequence[Any]) -> WordErrors:
    """Return word and character error rates of transcripts.

    Words are what white space separates. For `wer_normalised`, texts are normalised as in Whisper's paper for
    all languages (Radford et al. 2022, 2212.04356, appendix C).
    """
    import jiwer
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    wanted, plain = [example.response for example in examples], BasicTextNormalizer()
    pairs = zip(wanted, texts, strict=True)
    normalised = [pair for pair in ((plain(r).strip(), plain(t).strip()) for r, t in pairs) if pair[0]]
    overall = {"wer": jiwer.wer(wanted, list(texts)), "cer": jiwer.cer(wanted, list(texts))}
    if normalised:
        overall["wer_normalised"] = jiwer.wer([r for r, _ in normalised], [t for _, t in normalised])
    rates = [jiwer.wer(reference, text) for reference, text in zip(wanted, texts, strict=True)]
    return WordErrors(rates=np.array(rates), overall={name: float(value) for name, value in overall.items()})


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
