"""Encoders, encoder-decoders and models that see: each row of the tables is trained, saved, loaded and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from families import SITES_ALONE, table, task_of, trained
from PIL import Image
from safetensors.torch import load_file
from seeing_bases import BASES, write_base
from task_bases import save_base
from task_studies import study_of

from adaptive_lora.config import study_from
from adaptive_lora.models.classes import auto_class
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import TASKS, answer, load_adapter
from adaptive_lora.serving.images import as_patches

BYTES = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
ELSEWHERE = {"bert", "roberta", "deberta", "deberta-own-position-keys", "distilbert", "t5", "vit", "dinov2", "clip",
             "whisper", "llava", "idefics3"}  # fmt: skip
"""Rows that tests of their task train."""
TRAINED = {
    name: task for name in ARCHITECTURES.keys() - ELSEWHERE - SITES_ALONE.keys() if (task := task_of(name)) != "causal"
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "bases.md"


def test_the_families_are_those_of_the_page() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_every_row_that_sees_has_its_base() -> None:
    seeing = {name for name, task in TRAINED.items() if task not in ("classification", "seq2seq")}
    assert seeing == BASES.keys()


def write(name: str, folder: Path) -> Any:
    """Write a base of a row; return its processor if only this test has it."""
    if name in BASES:
        return write_base(name, folder)
    kind, settings, _ = ARCHITECTURES[name]
    own = {key: {**value, **BYTES} if isinstance(value, dict) else value for key, value in settings.items()}
    start = {"decoder_start_token_id": 257} if TRAINED[name] == "seq2seq" else {}
    config = getattr(transformers, kind)(**settings)
    save_base(folder, kind, {**own, **BYTES, **start}, auto_class(config)._model_mapping[type(config)].__name__)
    return None


def rows_of(task: str, study: Path) -> list[dict[str, str]]:
    """Return two rows to ask."""
    pictures = [{"image": str(study / "pictures" / f"{number}.png")} for number in (0, 1)]
    return {
        "classification": [{"text": "red old 7"}, {"text": "fast 8"}],
        "seq2seq": [{"prompt": "7 red old\n"}, {"prompt": "8 blue\n"}],
        "image_classification": pictures,
        "image_text": [{**each, "text": f"number {at} is red"} for at, each in enumerate(pictures)],
        "vision_language": [{**each, "question": "Which colour?"} for each in pictures],
    }[task]


def changed_pictures(folder: Path) -> None:
    """Make every second picture wider."""
    for number in range(0, 40, 2):
        with Image.open(folder / f"{number}.png") as picture:
            picture.resize((80, 40)).save(folder / f"{number}.png")


def assert_answers_are_not_seen(context: StudyContext, model: Any, example: Any) -> None:
    """Check that the last token of an answer changes no earlier logits."""
    inputs = as_patches(context.task.collate([example]).inputs)
    other = inputs["input_ids"].clone()
    other[0, -1] = (other[0, -1] + 1) % 256
    with torch.no_grad():
        first, second = (model(**{**inputs, "input_ids": ids}).logits[0] for ids in (inputs["input_ids"], other))
    torch.testing.assert_close(first[:-1], second[:-1], rtol=0, atol=0)
    assert not torch.equal(first[-1], second[-1])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of PaliGemma's processor
@pytest.mark.parametrize("name", trained(sorted(TRAINED)))
def test_from_plan_to_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TRAINED[name]
    options = study_of(task, tmp_path / "study")
    if processor := write(name, tmp_path / "base"):
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *given, **named: processor)
        if name.startswith(("qwen", "mistral")):
            changed_pictures(tmp_path / "study" / "pictures")
    config = study_from({**options, "model": str(tmp_path / "base"), "methods": "uniform:rank=2", "max_steps": 6})
    context = StudyContext(config)
    with torch.no_grad():
        before = context.losses(context.base.model, context.splits(0).train).loss
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    loaded = load_adapter(outcome.folder)
    model = loaded[0]
    assert context.losses(model, context.splits(0).train).loss < before
    probe = load_file(outcome.folder / PROBE)["logits"]
    torch.testing.assert_close(probe_logits(context, model, 0), probe, rtol=0, atol=0)
    rows = rows_of(task, tmp_path / "study")
    told = answer(loaded, rows, 3)
    assert told == [answer(loaded, [row], 3)[0] for row in rows]
    kind = float if TASKS[task].numbers else str
    assert all(isinstance(each, kind) for each in told)
    test = context.splits(0).test
    if task == "vision_language":
        assert_answers_are_not_seen(context, model, test[0])
    alone = [context.losses(model, [each]).nll_E[0] for each in test] if not task.startswith("image_t") else None
    if alone:  # neither padding nor the batch changes a score
        assert context.losses(model, test).nll_E == pytest.approx(alone, rel=1e-4)
    else:
        assert json.loads((outcome.folder / "adapter_config.json").read_text())["r"] == 2
