"""Making the embedded base: tokenizer, pretraining, and the record of how it went."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.seeding import torch_stream
from benchmarks.embedded_base.corpus import documents, recipe_summary
from benchmarks.embedded_base.tokenizer import CONTEXT, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYERS, WIDTH, HEADS = 6, 128, 4
STEPS = 5000
"""Optimiser steps of the shipped base."""
BATCH_ROWS, ROW_TOKENS = 8, 128
"""A step sees 8 rows of 128 tokens, each of whole documents but for the last."""
PEAK_LR, WARMUP, FLOOR = 2.5e-3, 200, 0.02
"""Peak learning rate, warm-up steps, and the share of the peak that the cosine ends at."""
THREADS = 1
"""Fixed, because the order of CPU sums depends on it; one is nearly as fast at this size."""
HELD_OUT_ROWS = 64
CURVE_POINTS = 50
RECORD = "pretraining.json"


def build_base(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    architecture: str = "gpt2",
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train tokenizer and model on the generated corpus and write the whole base folder.

    The same seed, steps, machine and library versions give the same weights.

    Args:
        folder: where to write; made if missing, files of the same names are replaced.
        seed: of initial weights, corpus and tokenizer.
        steps: optimiser steps of 1,024 tokens.
        architecture: key of `MODELS`: that of the shipped base, or one whose layers are Linear.
        on_step: called with the step (from 1) and its loss in nats per token.

    Returns:
        The record, also written as `pretraining.json`.
    """
    started = time.monotonic()
    tokenizer = train_tokenizer(seed)
    with torch_stream(seed, "embedded base"), _threads(THREADS):
        model = MODELS[architecture](tokenizer)
        curve = _pretrain(model, tokenizer, seed, steps, on_step or (lambda step, loss: None))
    record = {
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH_ROWS * ROW_TOKENS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch_rows": BATCH_ROWS,
        "row_tokens": ROW_TOKENS,
        "peak_lr": PEAK_LR,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_loss": curve[-1]["held_out_loss"],
        "loss_unit": "nats per token",
        "curve": curve,
        "corpus": recipe_summary(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gpt2(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return an untrained GPT-2 without dropout, for the corpus never repeats."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, fused
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def _llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return an untrained Llama of about the same size, with grouped keys and values and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


MODELS: Mapping[str, Callable[[PreTrainedTokenizerBase], PreTrainedModel]] = {"gpt2": _gpt2, "llama": _llama}
"""Architecture -> function that makes an untrained model."""


def packed_rows(seed: int | str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[torch.Tensor]:
    """Yield (rows, 128) token ids without end.

    A row starts with a document, as prompts do in use, and the last one is cut.
    """
    import torch

    stream = documents(seed)
    end = int(tokenizer.eos_token_id)
    while True:
        batch: list[list[int]] = []
        row: list[int] = []
        while len(batch) < rows:
            texts = [next(stream) for _ in range(32)]
            for ids in tokenizer(texts)["input_ids"]:
                row += [*ids, end]
                if len(row) >= ROW_TOKENS:
                    batch.append(row[:ROW_TOKENS])
                    row = []
        yield torch.tensor(batch[:rows])


def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: int | str) -> float:
    """Return the mean loss on 64 rows of documents that training never saw, in nats per token."""
    import torch

    rows = next(packed_rows(f"held out {sample}", tokenizer, HELD_OUT_ROWS))
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def _lr_share(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step from 0: warm-up, then cosine."""
    warmup = min(WARMUP, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def _pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    steps: int,
    on_step: Callable[[int, float], None],
) -> list[dict[str, float]]:
    """Train in place; return points of {step, tokens, train_loss, held_out_loss}."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _lr_share(at, steps))
    interval = max(10, math.ceil(steps / CURVE_POINTS))
    start = held_out_loss(model, tokenizer, seed)
    curve = [
        {"step": 0.0, "tokens": 0.0, "train_loss": math.log(model.config.vocab_size), "held_out_loss": round(start, 4)}
    ]
    losses: list[float] = []
    batches = packed_rows(f"train {seed}", tokenizer, BATCH_ROWS)
    for step in range(1, steps + 1):
        rows = next(batches)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step, losses[-1])
        if step % interval == 0 or step == steps:
            curve.append(
                {
                    "step": step,
                    "tokens": step * BATCH_ROWS * ROW_TOKENS,
                    "train_loss": round(sum(losses) / len(losses), 4),
                    "held_out_loss": round(held_out_loss(model, tokenizer, seed), 4),
                }
            )
            losses = []
    return curve
