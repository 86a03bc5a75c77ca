"""The setting in which training speed is measured: model, data and their useful work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from adaptive_lora.allocation import MethodSpec, allocate
from adaptive_lora.config import TrainConfig, study_from
from adaptive_lora.data import Batch, TokenizedExample, load_examples, tokenize, training_batches
from adaptive_lora.data import collate as padded
from adaptive_lora.methods.adapters import attach
from adaptive_lora.models.sites import find_sites

EXAMPLES, BATCH, RANK, RATE, LONGEST, SEED = 128, 8, 16, 3e-4, 512, 0
LAYERS, WIDTH, HEADS, VOCABULARY = 6, 384, 6, 50_257
TRAINING = TrainConfig(epochs=1.0, batch_size=BATCH, validations=1, precision="fp32")
PAD = 50_256


def examples(shared: Path, loss_on: str) -> tuple[TokenizedExample, ...]:
    """Return the first Alpaca rows, tokenised as a study does."""
    config = study_from({"data": str(shared / "data" / "alpaca_en_demo.json")})
    rows = load_examples(config.data).examples[:EXAMPLES]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gpt2-tokenizer")
    return tokenize(rows, tokenizer, max_tokens=LONGEST, loss_on=loss_on)


def base(layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY) -> Any:
    """Return a frozen GPT-2 with random weights and no dropout."""
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=width // 64 or 1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).requires_grad_(False)


def adapted(model: Any) -> Any:
    """Return the model with adapters of one rank on all sites, the same for every contender."""
    plan = allocate(MethodSpec.build("uniform", {"rank": RANK}), find_sites(model))
    return attach(model, plan, seed=SEED, dropout=0.0)


def collate(chosen: Any) -> Batch:
    """Return the padded batch of some examples."""
    return padded(chosen, PAD)


def batches(data: Any) -> Any:
    """Yield the seed's batches."""
    return training_batches(data, batch_size=BATCH, seed=SEED, collate=collate)


def useful_work(tokens: int, supervised: int) -> float:
    """Return the FLOPs that a step cannot do without.

    4 a weight of a frozen layer and token (product and gradient of its input), and 4 a weight of
    the head and supervised token. Adapters, attention, norms and activations count nothing.
    """
    layers = LAYERS * 12 * WIDTH**2
    return 4.0 * layers * tokens + 4.0 * WIDTH * VOCABULARY * supervised


class Turns:
    """A contender's side of the measurement: one optimiser step when the parent says go."""

    def __init__(self) -> None:
        """Keep standard output for the answers; whatever libraries print goes elsewhere."""
        self._answers: TextIO = sys.stdout
        sys.stdout = sys.stderr

    def wait(self) -> None:
        """Wait for the parent; end where it has ended."""
        if not sys.stdin.readline():
            raise SystemExit

    def answer(self, **values: float) -> None:
        """Tell the parent what a step was."""
        print(json.dumps(values), file=self._answers, flush=True)

    def serve(self, step: Callable[[], dict[str, float]]) -> None:
        """Run steps for ever, timing each."""
        while True:
            self.wait()
            started = time.perf_counter()
            found = step()
            self.answer(seconds=time.perf_counter() - started, **found)
