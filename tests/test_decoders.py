"""Every decoder of the tables is trained, saved and served, not only planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from families import PART, trained
from safetensors.torch import load_file
from task_bases import save_base
from test_family_architectures import BY_TOKEN, CAUSAL, NO_PREFIX

from adaptive_lora.errors import ModelError
from adaptive_lora.models.classes import auto_class
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import answer, load_adapter

CACHES = ("llama", "gpt2", "bloom", "falcon", "gemma2", "gemma3")
"""Rows whose caches differ, in which prefixes stand: the others are trained with prefixes in the long test."""
BYTES = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
MORE = (
    "prefix_tuning:tokens=2", "waterfill:rank=1", "uniform:rank=2,dora=true", "adalora:rank=1", "eva:rank=2",
    "prompt_tuning:tokens=2", "p_tuning:tokens=2,encoder_width=4", "ia3", "houlsby:width=2",
    "full", "ln_tuning",
)  # fmt: skip


def decoder(name: str, folder: Path) -> Path:
    """Write a small decoder with random weights and the byte tokenizer."""
    kind, settings, _ = ARCHITECTURES[name]
    folder.mkdir()
    own = {key: {**value, **BYTES} if key == "text_config" else value for key, value in settings.items()}
    config = getattr(transformers, kind)
    head = auto_class(config(**own))._model_mapping[config].__name__
    return save_base(folder, kind, own if "text_config" in own else {**own, **BYTES}, head)


@pytest.mark.parametrize("name", trained(CAUSAL))
def test_from_plan_to_answer(name: str, make_bench: Callable[..., StudyContext], tmp_path: Path) -> None:
    prefix = ("prefix_tuning:tokens=2",) if name in CACHES else ()
    train_and_serve(make_bench, name, ("uniform:rank=2", *prefix), tmp_path)


@pytest.mark.parametrize(("name", "option"), PART.items())
def test_text_trains_a_part_of_a_model_that_sees(
    name: str, option: str, make_bench: Callable[..., StudyContext], tmp_path: Path
) -> None:
    train_and_serve(make_bench, name, (f"uniform:rank=2{option}",), tmp_path, lr="3e-3")
    for method in ("uniform:rank=2", "peft:type=HIRA,r=2") if option else ():
        with pytest.raises(ModelError, match=r"\d+ linear layers .* do not reach the loss of this task"):
            make_bench(model=str(tmp_path / "base"), methods=method, seeds="0", task="causal")


@pytest.mark.long
@pytest.mark.parametrize("name", CAUSAL)
def test_from_plan_to_answer_by_other_methods(
    name: str, make_bench: Callable[..., StudyContext], tmp_path: Path
) -> None:
    refused = {"ln_tuning"} if name == "olmo" else {"prompt_tuning", "p_tuning"} if name in BY_TOKEN else set()
    refused |= {"prefix_tuning"} if name in NO_PREFIX else set()
    more = tuple(method for method in MORE if method.partition(":")[0] not in refused)
    train_and_serve(make_bench, name, more, tmp_path, gain=False)


def train_and_serve(
    make_bench: Callable[..., StudyContext],
    name: str,
    methods: tuple[str, ...],
    folder: Path,
    *,
    gain: bool = True,
    **changes: object,
) -> None:
    """Train, save, load and ask; with `gain` eight steps must lower the test loss, which needs a rate of the method."""
    context = make_bench(
        model=str(decoder(name, folder / "base")), methods=" ".join(methods), seeds="0",
        task="causal", max_steps=8, profile_batches=2, **changes,
    )  # fmt: skip
    frozen = context.base_scores(0)
    for trial in context.config.trials():
        outcome = run_trial(context, trial, folder / trial.method.label)
        assert (outcome.test.nll_E != frozen.nll_E).any()
        assert not gain or outcome.test.loss < frozen.loss or trial.method.name == "prefix_tuning"  # starts elsewhere
        loaded = load_adapter(outcome.folder)
        model = loaded[0]
        probe = load_file(outcome.folder / PROBE)["logits"]
        torch.testing.assert_close(probe_logits(context, model, 0), probe, rtol=0, atol=0)
        assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()
        told = answer(loaded, [{"instruction": "Say a"}, {"instruction": "Say"}], 3)
        assert all(isinstance(text, str) for text in told)
