"""Small bases of every task with random weights, and data for them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_byte_tokenizer
from rich.console import Console
from tracked import quiet

from adaptive_lora.config import StudyConfig
from adaptive_lora.results import TrialRecord
from adaptive_lora.steps import run_evaluate
from adaptive_lora.tracking import StudyRun, read_trials
from adaptive_lora.tracking.registry import MODEL_TAG
from adaptive_lora.verification import prove
from adaptive_lora.workbench import Workbench

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
WORDS = ["red", "blue", "green", "small", "large", "fast", "slow", "old"]


def save_base(folder: Path, kind: str, settings: dict[str, Any], head: str) -> Path:
    """Write a base of a configuration, saved from a class, with a byte tokenizer."""
    import transformers

    config = getattr(transformers, kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, head)(config)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


TEXT = {**SIZE, "vocab_size": 258, "pad_token_id": 257, "max_position_embeddings": 200}
ENCODERS = {
    "bert": ("BertConfig", TEXT, "BertForMaskedLM"),
    "roberta": (
        "RobertaConfig", {**TEXT, "max_position_embeddings": 400}, "RobertaForMaskedLM"
    ),
    "deberta": (
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "DebertaV2ForMaskedLM",
    ),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 258,
         "pad_token_id": 257, "max_position_embeddings": 200},
        "DistilBertForMaskedLM",
    ),
}  # fmt: skip


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Return texts whose class is that of their first word, and a score that counts letters."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        first, second = draw.sample(WORDS, 2)
        rows.append(
            {
                "text": f"{first} {second} {number}",
                "label": ["colour", "size", "other"][
                    0 if WORDS.index(first) < 3 else 1 if WORDS.index(first) < 5 else 2
                ],
                "score": len(first) + len(second) / 10,
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Proven:
    """A study whose every adapter gave its numbers again after it was loaded back."""

    records: list[TrialRecord]
    champion: str
    """URI of the registered winner."""
    shown: str


def run_and_prove(config: StudyConfig) -> Proven:
    """Run a study, load every logged adapter back, and score the winner by its registry URI."""
    outcome, shown = quiet(config)
    assert outcome.judgement.champion is not None, outcome.judgement.no_champion
    runs = StudyRun.find(outcome.store, outcome.judgement.study_id).children()
    records = read_trials(outcome.store, runs)
    assert [record.reason for record in records if record.status != "FINISHED"] == []
    bench = Workbench(config)
    for record in records:
        prove(bench, record, record.tags[MODEL_TAG])
    champion = f"models:/{config.tracking.registered_model}@champion"
    winner = next(r for r in records if r.tags[MODEL_TAG] == outcome.judgement.champion.model_uri)
    console = Console(file=StringIO(), width=200)
    run_evaluate(config, champion, 0, console, as_json=False)
    found = dict(line.split() for line in console.file.getvalue().splitlines())
    loss = winner.metrics["test/loss"]
    assert float(found["test/loss"].replace(",", "")) == pytest.approx(loss, rel=1e-5)
    return Proven(records=records, champion=champion, shown=shown)
