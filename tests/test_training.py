"""Training: one loss, paired trials, guard, early stopping, checkpointing, accumulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_made import byte_level, word_piece
from torch.nn import functional

from adaptive_lora.config import TrialSpec
from adaptive_lora.data import TokenizedExample
from adaptive_lora.errors import TrialFailed
from adaptive_lora.methods.adapters import attach, detach
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.models.losses import predict, token_losses
from adaptive_lora.models.tasks.causal import continuations, wants_generation
from adaptive_lora.models.tasks.scores import exact, token_example_scores
from adaptive_lora.results import TrainResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import TrialOutcome, run_trial
from adaptive_lora.runner.trial_log import trial_metrics
from adaptive_lora.training import StabilityGuard, Trainer, TrainInputs
from adaptive_lora.training.state import TrainerState
from adaptive_lora.training.stopping import EarlyStop

BaseContext = Callable[..., StudyContext]


def trials_of(context: StudyContext) -> list[TrialSpec]:
    """Return the trials of a workbench's study."""
    return list(context.config.trials())


def run(context: StudyContext, trial: TrialSpec, folder: Path) -> TrialOutcome:
    """Run a trial into a folder of its label."""
    return run_trial(context, trial, folder / trial.label)


def test_loss_equals_the_definition_in_float64(make_bench: BaseContext) -> None:
    context = make_bench()
    batch = context.task.collate(context.splits(0).train[:5])
    model = context.base.model.double()
    found = predict(model, batch)
    nll, scores = token_losses(found.logits, found.targets), token_example_scores(found.logits, found.targets)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for row, labels in enumerate(batch.labels):
        chosen = (labels[1:] != -100).nonzero().squeeze(1)
        expected = functional.cross_entropy(logits[row, chosen].float(), labels[chosen + 1], reduction="sum")
        assert float(nll[row].sum()) == pytest.approx(float(expected), rel=1e-6)
        right = (logits[row, chosen].argmax(-1) == labels[chosen + 1]).sum()
        assert scores.correct is not None
        assert int(scores.correct[row]) == int(right)


def test_scores_do_not_depend_on_the_batch_size(make_bench: BaseContext) -> None:
    one, many = (make_bench(eval_batch_size=size) for size in (1, 7))
    first, second = (b.losses(b.base.model, b.splits(0).test) for b in (one, many))
    np.testing.assert_allclose(first.nll_E, second.nll_E, rtol=1e-5)
    assert first.example_ids == second.example_ids
    assert first.loss == pytest.approx(first.nll_E.sum() / first.tokens_E.sum())
    assert first.perplexity == pytest.approx(math.exp(first.loss))


def test_same_trial_twice_is_bit_identical(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(dropout=0.2)
    trial = trials_of(context)[0]
    one, two = (run_trial(context, trial, tmp_path / name) for name in "ab")
    assert one.train.losses == two.train.losses
    assert one.test.nll_E.tolist() == two.test.nll_E.tolist()
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_seeds_differ(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="uniform:rank=2")
    one, two = (run(context, trial, tmp_path) for trial in trials_of(context))
    assert one.train.losses != two.train.losses


def test_other_methods_change_nothing(make_bench: BaseContext, tmp_path: Path) -> None:
    alone = make_bench(methods="uniform:rank=2", dropout=0.2, seeds="0")
    among = make_bench(methods="three_band:rank=3 empirical:rank=2 uniform:rank=2", dropout=0.2, seeds="0")
    expected = run(alone, trials_of(alone)[0], tmp_path / "alone")
    outcomes = [run(among, trial, tmp_path / "among") for trial in trials_of(among)]
    assert outcomes[2].train.losses == expected.train.losses
    assert outcomes[2].test.nll_E.tolist() == expected.test.nll_E.tolist()
    first_losses = {outcome.train.losses[0] for outcome in outcomes}
    assert len(first_losses) == 1  # B is zero: same examples, same base dropout, same loss


def test_a_duplicate_of_uniform_is_uniform(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="uniform:rank=2 linear_decay:rank=2,low_rank=2", seeds="0", dropout=0.1)
    one, two = (run(context, trial, tmp_path) for trial in trials_of(context))
    assert one.train.losses == two.train.losses
    assert one.test.nll_E.tolist() == two.test.nll_E.tolist()


def test_accumulation_equals_a_larger_batch(make_bench: BaseContext, tmp_path: Path) -> None:
    whole = make_bench(batch_size=8, methods="uniform:rank=2", seeds="0", max_steps=2)
    parts = make_bench(batch_size=4, accumulation=2, methods="uniform:rank=2", seeds="0", max_steps=2)
    for context in (whole, parts):
        context.base.model.config.resid_pdrop = 0.0
        for module in context.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    one, two = (run(b, trials_of(b)[0], tmp_path / str(b.config.train.batch_size)) for b in (whole, parts))
    np.testing.assert_allclose(one.train.losses, two.train.losses, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(make_bench: BaseContext, tmp_path: Path) -> None:
    outcomes = []
    for enabled in ("false", "true"):
        context = make_bench(gradient_checkpointing=enabled, dropout=0.2, methods="uniform:rank=2", seeds="0")
        outcomes.append(run(context, trials_of(context)[0], tmp_path / enabled))
        assert not context.base.model.transformer.gradient_checkpointing
    assert outcomes[0].train.losses == outcomes[1].train.losses


def test_bf16_trains_with_fp32_adapters(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(precision="bf16", methods="uniform:rank=2", seeds="0")
    outcome = run(context, trials_of(context)[0], tmp_path)
    assert outcome.train.precision == "bf16"
    assert math.isfinite(outcome.test.loss)
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    layers = lora_layers(attach(context.base.model, plan, seed=0, dropout=0.0))
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for layer in layers.values())
    assert context.base.model.dtype == torch.bfloat16


def test_training_learns(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(epochs=99, max_steps=40, methods="uniform:rank=8", seeds="0", validations=4)
    outcome = run(context, trials_of(context)[0], tmp_path)
    curve = dict(outcome.train.validation_curve)
    assert list(curve) == [0, 10, 20, 30, 40]
    assert curve[40] < curve[0] - 0.1
    metrics = trial_metrics(context, outcome, 0)
    gain = context.base_scores(0).loss - outcome.test.loss
    assert metrics["efficiency_ratio"] == pytest.approx(gain / metrics["trainable_parameters"] * 1e6)
    assert metrics["reduction_vs_full"] == pytest.approx(
        1 - metrics["trainable_parameters"] / metrics["total_parameters"]
    )
    assert metrics["train/supervised_tokens"] > 0


def test_guard_counts_and_fails() -> None:
    guard = StabilityGuard(2)
    assert guard.allows(1, 1.0, 1.0)
    assert not guard.allows(2, math.nan, 1.0)
    assert not guard.allows(3, 1.0, math.inf)
    with pytest.raises(TrialFailed, match="3 steps skipped, 2 allowed"):
        guard.allows(4, math.nan, math.nan)


def test_non_finite_steps_are_skipped_then_fail(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="uniform:rank=2", seeds="0", max_steps=4, max_skipped_steps=1)
    trial = trials_of(context)[0]
    poison = {2}
    calls = {"count": 0}

    def poisoned(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        calls["count"] += 1
        return output * math.nan if calls["count"] in poison else None

    hook = context.base.model.transformer.ln_f.register_forward_hook(poisoned)
    outcome = run(context, trial, tmp_path)
    assert outcome.train.skipped_steps == 1
    assert math.isnan(outcome.train.losses[1])
    assert math.isfinite(outcome.test.loss)
    calls["count"], poison = 0, {1, 2, 3, 4}
    with pytest.raises(TrialFailed, match="Lower the learning rate"):
        run(context, trial, tmp_path / "again")
    hook.remove()
    assert lora_layers(context.base.model) == {}


def test_early_stop_keeps_the_best() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    stop = EarlyStop(2)
    for loss in (3.0, 1.0, 2.0, 1.5):
        with torch.no_grad():
            weight.fill_(loss)
        stop.see(loss, [weight])
    assert stop.stop
    stop.restore_best([weight])
    assert weight.item() == stop.kept_loss == 1.0


def test_early_stopping_ends_a_trial(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(
        methods="uniform:rank=2", seeds="0", lr="3", epochs=99, max_steps=40, validations=40, patience=1, warmup_share=0
    )
    outcome = run(context, trials_of(context)[0], tmp_path)
    assert outcome.train.stopped_early
    assert len(outcome.train.losses) < 40
    trained = [loss for step, loss in outcome.train.validation_curve if step > 0]
    assert outcome.train.validation_loss == min(trained)


def test_greedy_exact_match(make_bench: BaseContext) -> None:
    context = make_bench(generate="auto", short_answer_tokens=3)
    test = context.splits(0).test
    assert not wants_generation(test, context.config.evaluation)
    model, tokenizer = context.base.model, context.base.tokenizer  # it never swaps words
    texts = continuations(model, tokenizer, test, runtime=context.runtime, batch_size=3)
    answers = [example.input_ids[example.prompt_length :] for example in test]
    assert exact(texts, test, tokenizer, answers).tolist() == [0.0] * len(test)


def test_an_answer_that_its_tokenizer_writes_otherwise_can_be_right() -> None:
    """Without case, without line breaks, without its special tokens."""
    lower, marked, plain = word_piece(), byte_level("<think>"), byte_level()
    for tokenizer, response, text, right in (
        (lower, "The River", "the river", True),
        (lower, "The River", "the garden", False),
        (marked, "<think>yes", "yes", True),
        (plain, "The River", "the river", False),
    ):
        ids = tokenizer(response)["input_ids"]
        whole = TokenizedExample(id="", input_ids=ids, first_label=1, prompt_length=0, response=response)
        assert exact([text], [whole], tokenizer, [ids]).tolist() == [right]
        part = dataclasses.replace(whole, cut=1)
        assert exact([text], [part], tokenizer, [ids]).tolist() == [0.0]


@pytest.mark.parametrize("stop", [1, 5])
def test_interrupted_and_resumed_is_the_uninterrupted_training(make_bench: BaseContext, stop: int) -> None:
    context = make_bench(
        methods="uniform:rank=2", max_steps=6, epochs=9, dropout=0.1, accumulation=2,
        validations=6, patience=3,
    )  # fmt: skip
    plan, parts = context.plan(context.config.specs[0], seed=0, fold=0), context.splits(0)
    kept: dict[str, TrainerState] = {}

    def keep(step: int, take: Callable[[], TrainerState]) -> None:
        if step == stop:
            kept["snapshot"] = take()
            raise KeyboardInterrupt

    def trainer(**more: Any) -> tuple[TrainResult, list[torch.Tensor]]:
        adapted = attach(context.base.model, plan, seed=0, dropout=0.1)
        inputs = TrainInputs(
            examples=parts.train,
            collate=context.task.collate,
            validate=lambda model: context.losses(model, parts.validation).loss,
            **more,
        )
        try:
            result = Trainer(adapted, inputs, context.config.train, context.runtime, lr=1e-2, seed=0).run()
            return result, [p.detach() for p in adapted.parameters() if p.requires_grad]
        finally:
            detach(adapted)

    whole, expected = trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer(on_snapshot=keep)
    result, found = trainer(resume=kept["snapshot"])
    timed = {"seconds": 0.0, "peak_memory_bytes": 0}
    assert dataclasses.replace(result, **timed) == dataclasses.replace(whole, **timed)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
