"""Every decoder of the tables is trained, saved and served, not only planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from task_bases import save_base
from test_family_architectures import CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as HEADS

from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import answer, load_adapter

BYTES = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
METHODS = ("uniform:rank=2", "prefix_tuning:tokens=2")
MORE = (
    "waterfill:rank=1", "uniform:rank=2,dora=true", "adalora:rank=1", "eva:rank=2",
    "prompt_tuning:tokens=2", "p_tuning:tokens=2,encoder_width=4", "ia3", "houlsby:width=2",
    "full", "ln_tuning",
)  # fmt: skip


def decoder(name: str, folder: Path) -> Path:
    """Write a small decoder with random weights and the byte tokenizer."""
    kind, settings, _ = ARCHITECTURES[name]
    folder.mkdir()
    head = HEADS[getattr(transformers, kind).model_type]
    return save_base(folder, kind, {**settings, **BYTES}, str(head))


@pytest.mark.parametrize("name", CAUSAL)
def test_from_plan_to_answer(name: str, make_bench: Callable[..., StudyContext], tmp_path: Path) -> None:
    train_and_serve(make_bench, name, METHODS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", CAUSAL)
def test_from_plan_to_answer_by_other_methods(
    name: str, make_bench: Callable[..., StudyContext], tmp_path: Path
) -> None:
    train_and_serve(make_bench, name, MORE, tmp_path)


def train_and_serve(make_bench: Callable[..., StudyContext], name: str, methods: tuple[str, ...], folder: Path) -> None:
    context = make_bench(
        model=str(decoder(name, folder / "base")), methods=" ".join(methods), seeds="0",
        max_steps=8, profile_batches=2,
    )  # fmt: skip
    frozen = context.base_scores(0).loss
    for trial in context.config.trials():
        outcome = run_trial(context, trial, folder / trial.method.label)
        assert outcome.test.loss < frozen or outcome.plan.positions  # prompts do not start as it
        loaded = load_adapter(outcome.folder)
        model = loaded[0]
        probe = load_file(outcome.folder / PROBE)["logits"]
        torch.testing.assert_close(probe_logits(context, model, 0), probe, rtol=0, atol=0)
        assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()
        told = answer(loaded, [{"instruction": "Say a"}, {"instruction": "Say"}], 3)
        assert all(isinstance(text, str) for text in told)
