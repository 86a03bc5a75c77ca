"""Losses and scores over tokens, from logits aligned with their targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional

from adaptive_lora.data.batches import IGNORED
from adaptive_lora.models.scoring import ExampleScores
from adaptive_lora.results import EvalResult, FloatArray


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return negative log-likelihoods in nats, shape (B, T), 0 where not supervised."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


def token_example_scores(logits: torch.Tensor, targets: torch.Tensor) -> ExampleScores:
    """Return the scores of B examples from (B, T, V) logits and (B, T) targets."""
    supervised = targets != IGNORED
    hits = (logits.argmax(dim=-1) == targets) & supervised
    return ExampleScores(
        nll=token_losses(logits, targets).double().sum(dim=1), units=supervised.sum(dim=1), correct=hits.sum(dim=1)
    )


def token_metrics(result: EvalResult) -> dict[str, float]:
    """Return the metrics over tokens: perplexity, accuracy and number of tokens."""
    assert result.perplexity is not None
    assert result.token_accuracy is not None
    return {
        "perplexity": result.perplexity,
        "token_accuracy": result.token_accuracy,
        "supervised_tokens": float(result.tokens_E.sum()),
    }


def with_end(ids: Sequence[int], end: int | None, most: int) -> tuple[int, ...]:
    """Return a response's tokens, cut, with the end-of-text token unless it was cut."""
    whole = [*ids] if end is None or (ids and ids[-1] == end) else [*ids, end]
    return tuple(whole[:most])


def exact(
    texts: Sequence[str], examples: Sequence[Any], tokenizer: Any, answers: Iterable[Sequence[int]]
) -> FloatArray:
    """Return 1 where a text equals the response, ignoring white space at both ends, else 0.

    The response as decoded by the tokenizer counts as well: a tokenizer without case or line breaks,
    or with tokens left out of texts, cannot produce any other text.

    Args:
        texts: generated texts.
        examples: examples with `response`, and `cut` where it was truncated.
        tokenizer: tokenizer that decoded the texts.
        answers: token ids of each response.
    """
    import numpy as np

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


def rouge(texts: Sequence[str], examples: Sequence[Any]) -> dict[str, FloatArray]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (F measure, Lin 2004) of each example, without stemming.

    By Google's rouge-score, whose words are runs of a-z and 0-9, so that it does not apply to other
    scripts.
    """
    import numpy as np
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names), use_stemmer=False)
    found = [scorer.score(e.response, text) for text, e in zip(texts, examples, strict=True)]
    return {shown: np.array([each[name].fmeasure for each in found]) for name, shown in names.items()}
