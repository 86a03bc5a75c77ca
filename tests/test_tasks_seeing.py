"""Pictures: classes, captions and questions, from a folder to a proven adapter."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file
from task_bases import SEEING, run_and_prove, save_pictures, save_seeing_base, small_study
from torch.nn import functional

from adaptive_lora.errors import AllocationError, ConfigError, DataError
from adaptive_lora.models.tasks.image_text import pair_losses, recall
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import content_hash, load_adapter


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_seeing_base(tmp_path_factory.mktemp(name), kind, settings, head)
        for name, (kind, settings, head) in SEEING.items()
    }


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-six pictures in one folder, with a table of what is on them."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = save_pictures(folder, 36)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_folder_of_images(bases: dict[str, Path], own_store: str, tmp_path: Path, name: str) -> None:
    for row in save_pictures(tmp_path / "loose", 24):
        (tmp_path / "images" / row["label"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / row["image"]).rename(tmp_path / "images" / row["label"] / row["image"])
    config = small_study(
        bases[name],
        tmp_path / "images",
        tracking_uri=own_store,
        methods="uniform:rank=2 waterfill:rank=1" if name == "vit" else "uniform:rank=2",
        max_steps=20,
    )
    proven = run_and_prove(config)
    record = proven.records[0]
    assert record.tags["task"] == "image_classification"
    assert record.metrics["test/accuracy"] > 0.6  # three colours are easily told apart
    assert record.metrics["head_parameters"] > 0
    served = mlflow.pyfunc.load_model(proven.champion)
    blue = next((tmp_path / "images" / "blue").iterdir())
    text = base64.b64encode(blue.read_bytes()).decode()
    assert served.predict([{"image": text}]) == served.predict([{"image": str(blue)}])
    assert set(served.predict([{"image": text}])) <= {"red", "green", "blue"}


def test_captions(bases: dict[str, Path], own_store: str, images: Path) -> None:
    """Both towers are measured and trained; one can be left out."""
    config = small_study(
        bases["clip"],
        images / "rows.json",
        methods="uniform:rank=2 empirical:rank=1 uniform:rank=2,towers=vision",
        tracking_uri=own_store,
    )
    proven = run_and_prove(config)
    assert "nats per pair" in proven.shown
    towers = {record.method: {site["tower"] for site in record.plan["sites"]} for record in proven.records}
    assert towers["uniform-r2"] == towers["empirical-r1"] == {"text_model", "vision_model"}
    assert towers["uniform-r2-vision"] == {"vision_model"}
    for record in proven.records:
        assert record.metrics["head_parameters"] == 0
        first = record.metrics["test/image_to_text_recall_at_1"]
        assert 0 <= first <= record.metrics["test/image_to_text_recall_at_5"] <= 1
    served = mlflow.pyfunc.load_model(proven.champion)
    rows = [{"image": str(images / "0.png"), "text": "number 0 is red"}]
    assert -1 <= served.predict(rows)[0] <= 1


def test_losses_of_pairs_by_hand(bases: dict[str, Path], images: Path) -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    first = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)[0]
    second = -torch.log_softmax(torch.tensor([2.0, 1.0]), 0)[0]
    assert pair_losses(logits)[0] == pytest.approx(float(first + second) / 2)
    same = torch.eye(2).bool()
    assert recall(torch.tensor([[2.0, 0.0], [1.0, 0.5]]), same, 1).tolist() == [1, 0]
    assert recall(logits, same, 5).tolist() == [1, 1]
    context = StudyContext(small_study(bases["clip"], images / "rows.json"))
    test = context.splits(0).test
    batch = context.task.collate(test)
    found = context.base.model(**batch.inputs)
    wanted = torch.arange(len(test))
    both = functional.cross_entropy(found.logits_per_image, wanted) + functional.cross_entropy(
        found.logits_per_text, wanted
    )
    assert context.losses(context.base.model, test).loss == pytest.approx(float(both) / 2, rel=1e-5)
    assert context.task.loss(context.base.model, batch).item() == pytest.approx(float(both) / 2 * len(test), rel=1e-5)


def test_pairs_cannot_be_taken_apart(bases: dict[str, Path], images: Path) -> None:
    context = StudyContext(small_study(bases["clip"], images / "rows.json"))
    batch = context.task.collate(context.splits(0).train[:4])
    assert batch.parts(1) == [batch]
    with pytest.raises(AllocationError, match="gradients of single examples"):
        context.profile("gradient_variance", seed=0, fold=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 2"):
        StudyContext(small_study(bases["clip"], images / "rows.json", batch_size=1))


def test_questions_about_pictures(bases: dict[str, Path], own_store: str, images: Path) -> None:
    config = small_study(
        bases["llava"],
        images / "rows.json",
        methods="uniform:rank=2 empirical:rank=1,towers=language",
        tracking_uri=own_store,
        generate="on",
    )
    proven = run_and_prove(config)
    for record in proven.records:
        test = record.test
        assert test is not None
        assert test.exact_match_E is not None
        assert record.metrics["test/supervised_tokens"] == test.tokens_E.sum()
    served = mlflow.pyfunc.load_model(proven.champion)
    rows = [{"image": str(images / "0.png"), "question": "Which colour?"}]
    assert isinstance(served.predict(rows, params={"max_new_tokens": 3})[0], str)


def test_the_picture_of_another_architecture(bases: dict[str, Path], images: Path, tmp_path: Path) -> None:
    """Idefics3, whose architecture SmolVLM has: one row a picture where it is not split."""
    context = StudyContext(small_study(bases["idefics3"], images / "rows.json", generate="on"))
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert outcome.test.loss < context.base_scores(0).loss
    assert {entry.site.tower for entry in outcome.plan.entries} == {"vision_model", "text_model"}
    model, _, _ = load_adapter(outcome.folder)
    probe = load_file(outcome.folder / PROBE)["logits"]
    assert torch.equal(probe_logits(context, model, 0), probe)


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_answers_score_as_the_model_scores_them(bases: dict[str, Path], images: Path, name: str) -> None:
    """Padding and batching change nothing; the model's own loss is the same mean."""
    context = StudyContext(small_study(bases[name], images / "rows.json"))
    test = context.splits(0).test
    result = context.losses(context.base.model, test)
    for example, nll in zip(test, result.nll_E, strict=True):
        batch = context.task.collate([example])
        own = context.base.model(**batch.inputs, labels=batch.labels).loss
        assert nll == pytest.approx(float(own) * example.supervised_tokens, rel=1e-4)


def test_what_is_no_picture(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    rows = [{"image": "0.png", "label": "a"}, {"image": "0.png", "label": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.json item 0 \(line 1\): column 'image' must be"):
        StudyContext(small_study(bases["vit"], tmp_path / "rows.json"))


def test_how_images_are_prepared_is_part_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["vit"], tmp_path / "copy")
    assert content_hash(tmp_path / "copy") == content_hash(bases["vit"])
    settings = tmp_path / "copy" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.00392", "0.00391"), encoding="utf-8")
    assert content_hash(tmp_path / "copy") != content_hash(bases["vit"])
