"""A study's batching: packed where the base can, and the numbers of padded batches either way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Options, save_byte_tokenizer
from transformers import BloomConfig, BloomForCausalLM, GPT2LMHeadModel

from adaptive_lora.errors import ConfigError
from adaptive_lora.models.kernels import attends_packed
from adaptive_lora.results import EvalResult, TrainResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial_context import TrialOnBase

MakeBench = Callable[..., StudyContext]


@pytest.fixture
def still_base(base_folder: Path, tmp_path: Path) -> Path:
    """The small GPT-2 without its own dropout, whose masks depend on a batch's form."""
    model = GPT2LMHeadModel.from_pretrained(base_folder, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.save_pretrained(tmp_path / "still")
    save_byte_tokenizer(tmp_path / "still")
    return tmp_path / "still"


def trained(context: StudyContext) -> tuple[TrainResult, EvalResult]:
    job = TrialOnBase(context, next(iter(context.config.trials())), lambda event: None)
    try:
        done = job.trial.method.options.fit(job)
        return done.result, context.score(done.model, context.splits(0).test)
    finally:
        job.release()


@pytest.mark.parametrize(
    "method",
    ["uniform:rank=2", "adalora:rank=2", "grow_prune:rank=2", "full", "prompt_tuning"],
    ids=lambda method: method.partition(":")[0],
)
def test_losses_are_those_of_padded_batches(make_bench: MakeBench, still_base: Path, method: str) -> None:
    curves = {}
    for batching in ("auto", "padded"):
        context = make_bench(
            model=str(still_base), methods=method, seeds="0", max_steps=8, lr="3e-3",
            batching=batching, validations=2,
        )  # fmt: skip
        curves[batching] = trained(context)
        assert not attends_packed(context.base.model)
    (packed, score), (padded, plain) = curves["auto"], curves["padded"]
    np.testing.assert_allclose(packed.losses, padded.losses, rtol=1e-5)
    np.testing.assert_allclose(packed.validation_loss, padded.validation_loss, rtol=1e-5)
    np.testing.assert_allclose(score.nll_E, plain.nll_E, rtol=1e-4)
    assert packed.order_digest == padded.order_digest
    assert packed.tokens == padded.tokens
    assert (score.tokens_E == plain.tokens_E).all()


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    """A base whose attention takes no function from outside."""
    config = BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=2, eos_token_id=256)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    save_byte_tokenizer(tmp_path / "bloom")
    return tmp_path / "bloom"


def test_a_base_that_cannot_pack_is_padded_and_said_so(
    make_bench: MakeBench, bloom: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_bench(model=str(bloom), methods="uniform:rank=2", seeds="0")
    with caplog.at_level(logging.WARNING), context.task.running(context.base.model):
        assert not attends_packed(context.base.model)
    assert "batches of BloomForCausalLM are padded" in caplog.text
    with pytest.raises(ConfigError, match="BloomForCausalLM cannot run on packed rows"):
        make_bench(model=str(bloom), methods="uniform:rank=2", seeds="0", batching="packed")


def test_scores_do_not_depend_on_how_examples_are_grouped(make_bench: MakeBench, options: Options) -> None:
    found = []
    for size in (1, 2, 64):
        context = make_bench(eval_batch_size=size)
        found.append(context.losses(context.base.model, context.splits(0).train))
    for other in found[1:]:
        np.testing.assert_allclose(other.nll_E, found[0].nll_E, rtol=1e-5)
        assert (other.correct_E == found[0].correct_E).all()
