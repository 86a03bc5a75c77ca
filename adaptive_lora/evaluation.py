"""Scores of a model on a part of the data, per example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adaptive_lora.adapter_serving import generate
from adaptive_lora.config import EvaluationConfig
from adaptive_lora.data import TokenizedExample, collate
from adaptive_lora.losses import token_scores
from adaptive_lora.results import EvalResult, FloatArray
from adaptive_lora.runtime import Runtime

SHARE_OF_SHORT_ANSWERS = 0.9
"""`generate: auto` scores exact match where at least this share of responses is short."""


def evaluate(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    *,
    runtime: Runtime,
    pad_id: int,
    batch_size: int,
) -> EvalResult:
    """Return negative log-likelihood and token accuracy per example, without gradients.

    Examples are batched by length to save padding and returned in their own order.

    Args:
        model: causal language model; left in evaluation mode.
        examples: at least one.
        runtime: device and precision of the forward passes.
        pad_id: token id for padding.
        batch_size: examples per forward pass.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    nll = np.zeros(len(examples))
    tokens, correct = (np.zeros(len(examples), dtype=np.int64) for _ in range(2))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[index] for index in chosen], pad_id).to(runtime.device)
        with torch.no_grad(), runtime.accelerator.autocast():
            scores = token_scores(model, batch)
        nll[chosen] = scores.nll.double().sum(dim=1).cpu().numpy()
        tokens[chosen] = scores.supervised.sum(dim=1).cpu().numpy()
        correct[chosen] = scores.correct.sum(dim=1).cpu().numpy()
    return EvalResult(
        example_ids=tuple(example.id for example in examples),
        nll_E=nll,
        tokens_E=tokens,
        correct_E=correct,
    )


def wants_generation(examples: Sequence[TokenizedExample], config: EvaluationConfig) -> bool:
    """Return whether exact match is scored on this part."""
    if config.generate != "auto":
        return config.generate == "on"
    lengths = [len(example.input_ids) - example.prompt_length for example in examples]
    short = sum(length <= config.short_answer_tokens for length in lengths)
    return short >= SHARE_OF_SHORT_ANSWERS * len(lengths)


def exact_matches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    *,
    runtime: Runtime,
    batch_size: int,
) -> FloatArray:
    """Return per example 1 where greedy generation equals the reference, else 0.

    Both texts are compared after stripping white space at the ends. Generation may use as many
    tokens as the longest reference.
    """
    model.eval()
    longest = max(len(example.input_ids) - example.prompt_length for example in examples)
    with runtime.accelerator.autocast():
        texts = generate(
            model,  # type: ignore[arg-type]
            tokenizer,
            [example.input_ids[: example.prompt_length] for example in examples],
            max_new_tokens=longest,
            batch_size=batch_size,
        )
    return np.array([float(t == e.response.strip()) for t, e in zip(texts, examples, strict=True)])
