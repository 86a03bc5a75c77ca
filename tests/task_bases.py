"""Small bases of every task with random weights, and data for them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import away_from_zero
from conftest import save_byte_tokenizer
from rich.console import Console
from tracked import quiet

from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.results import TrialRecord
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.result import prove
from adaptive_lora.runner.steps import run_evaluate
from adaptive_lora.tracking import StudyRun, read_trials
from adaptive_lora.tracking.registry import MODEL_TAG

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
WORDS = ["red", "blue", "green", "small", "large", "fast", "slow", "old"]


def small_study(model: Path, data: Path, **changes: object) -> StudyConfig:
    """Return a study of a base and data of any task that runs in seconds."""
    return study_from(
        {
            "model": str(model),
            "data": str(data),
            "methods": "uniform:rank=2",
            "seeds": "0",
            "lr": "1e-2",
            "max_steps": 3,
            "batch_size": 4,
            "validations": 1,
            "profile_batches": 2,
            "precision": "fp32",
            **changes,
        }
    )


def save_base(folder: Path, kind: str, settings: dict[str, Any], head: str) -> Path:
    """Write a base of a configuration, saved from a class, with a byte tokenizer."""
    import transformers

    config = getattr(transformers, kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = away_from_zero(getattr(transformers, head)(config))
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


def tagged_rows(count: int) -> list[dict[str, list[str]]]:
    """Return words with tags of entities: a colour is a thing of one word, a size begins one of two."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        colour, size, other = draw.choice(WORDS[:3]), draw.choice(WORDS[3:5]), draw.choice(WORDS[5:])
        rows.append(
            {
                "tokens": [str(number), colour, other, size, "thing"],
                "ner_tags": ["O", "B-colour", "O", "B-size", "I-size"],
            }
        )
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
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
    report: Path


def run_and_prove(config: StudyConfig) -> Proven:
    """Run a study, load every logged adapter back, and score the winner by its registry URI."""
    outcome, shown = quiet(config)
    assert outcome.study_result.champion is not None, outcome.study_result.no_champion
    runs = StudyRun.find(outcome.store, outcome.study_result.study_id).children()
    records = read_trials(outcome.store, runs)
    assert [record.reason for record in records if record.status != "FINISHED"] == []
    context = StudyContext(config)
    for record in records:
        prove(context, record, record.tags[MODEL_TAG])
    champion = f"models:/{config.tracking.registered_model}@champion"
    winner = next(r for r in records if r.tags[MODEL_TAG] == outcome.study_result.champion.model_uri)
    console = Console(file=StringIO(), width=200)
    run_evaluate(config, champion, 0, console)
    lines = console.file.getvalue().splitlines()
    found = dict(line.split() for line in lines if line.startswith("test/"))
    loss = winner.metrics["test/loss"]
    assert float(found["test/loss"].replace(",", "")) == pytest.approx(loss, rel=1e-5)
    return Proven(records=records, champion=champion, shown=shown, report=outcome.study_result.report())


def save_seeing_base(folder: Path, kind: str, settings: dict[str, Any], head: str) -> Path:
    """Write a base that sees, with a processor of the Pillow backend."""
    import transformers

    config = getattr(transformers, kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, head)(config)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    cut = {"size": {"shortest_edge": 32}, "crop_size": size}
    processors: dict[str, Any] = {
        "ViTConfig": ("ViTImageProcessorPil", {"size": size}),
        "Dinov2Config": (
            "BitImageProcessorPil",
            {"size": {"shortest_edge": 32}, "crop_size": size},
        ),
        "CLIPConfig": ("CLIPImageProcessorPil", cut),
        "LlavaConfig": (
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": 32}, "crop_size": size},
        ),
        "Idefics3Config": (
            "Idefics3ImageProcessorPil",
            {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32},
             "do_image_splitting": False},
        ),
    }  # fmt: skip
    name, options = processors[kind]
    images = getattr(transformers, name)(**options)
    if kind == "CLIPConfig":
        transformers.CLIPProcessor(images, byte_tokenizer(end=True)).save_pretrained(folder)
    elif kind == "LlavaConfig":
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        transformers.LlavaProcessor(
            images, tokenizer, patch_size=16, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(folder)  # fmt: skip
    elif kind == "Idefics3Config":
        tokenizer = byte_tokenizer()
        marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        transformers.Idefics3Processor(images, tokenizer, image_seq_len=1).save_pretrained(folder)
    else:
        images.save_pretrained(folder)
    return folder


def byte_tokenizer(*, end: bool = False) -> Any:
    """Return the byte tokenizer; with `end` it ends every text."""
    from tempfile import TemporaryDirectory

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    with TemporaryDirectory() as place:
        save_byte_tokenizer(Path(place))
        tokenizer = AutoTokenizer.from_pretrained(place)
    if end:
        mark = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {mark}", special_tokens=[(mark, tokenizer.eos_token_id)]
        )
    return tokenizer


VISION = {**SIZE, "image_size": 32, "patch_size": 16, "projection_dim": 16}
DECODER = {
    **SIZE, "vocab_size": 259, "num_key_value_heads": 2, "max_position_embeddings": 200,
    "model_type": "llama", "pad_token_id": 257, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
SEEING = {
    "vit": ("ViTConfig", VISION, "ViTModel"),
    "dinov2": ("Dinov2Config", {**VISION, "intermediate_size": None}, "Dinov2Model"),
    "clip": (
        "CLIPConfig",
        {
            "text_config": {**TEXT, "projection_dim": 16, "eos_token_id": 256,
                            "bos_token_id": None},
            "vision_config": VISION,
            "projection_dim": 16,
        },
        "CLIPModel",
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": DECODER,
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 258,
            "image_token_id": 258,
            "vision_feature_layer": -1,
        },
        "LlavaForConditionalGeneration",
    ),
    "idefics3": (
        "Idefics3Config",
        {
            "text_config": {**DECODER, "vocab_size": 262},
            "vision_config": {**SIZE, "image_size": 32, "patch_size": 16},
            "image_token_id": 258,
            "scale_factor": 2,
        },
        "Idefics3ForConditionalGeneration",
    ),
}  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


def save_pictures(folder: Path, count: int) -> list[dict[str, str]]:
    """Write pictures of one colour and some noise; return what is on each."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % 3]
        pixels = np.array(COLOURS[colour]) + draw.integers(-30, 30, size=(40, 40, 3))
        name = f"{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / name)
        rows.append(
            {
                "image": name,
                "label": colour,
                "caption": f"number {number} is {colour}",
                "question": "Which colour?",
                "answer": colour,
            }
        )
    return rows
