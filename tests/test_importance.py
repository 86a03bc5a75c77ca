"""Profilers: one contract for all, and what flows through sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from profiled import profile
from rich.console import Console
from torch import nn
from tracked import store_in
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import METRICS, SPECTRAL_METRICS
from adaptive_lora.config import StudyConfig
from adaptive_lora.data import Batch
from adaptive_lora.errors import AllocationError, ModelError
from adaptive_lora.methods.importance import PROFILERS, ImportanceProfile, passes, profile_importance
from adaptive_lora.methods.importance.contract import PassLimits
from adaptive_lora.models.losses import causal_loss
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.measure import run_profiles
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.runner.trial_log import trial_metrics

BaseContext = Callable[..., StudyContext]
WEIGHTS_ONLY = {"heavy_tail", "stable_rank", "condition_number"}


@pytest.fixture
def context(make_bench: BaseContext) -> StudyContext:
    return make_bench(profile_batches=4, profile_batch_size=3)


def timeless(profile: ImportanceProfile) -> dict[str, object]:
    """Return a profile's values but for its time."""
    return {**profile.to_dict(), "seconds": None}


def state(model: nn.Module) -> list[object]:
    """Return everything that a profiler could leave changed."""
    return [
        [(name, p.data_ptr(), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        [(type(m), len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks))
         for m in model.modules()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]  # fmt: skip


def test_every_metric_has_a_profiler() -> None:
    assert list(PROFILERS) == list(METRICS)


@pytest.mark.parametrize("metric", PROFILERS)
class TestContract:
    """What every profiler promises."""

    def test_scores_and_spectra(self, context: StudyContext, metric: str) -> None:
        found = profile(context, metric)
        names = [site.name for site in context.sites]
        assert list(found.scores) == names
        assert all(math.isfinite(score) and score >= 0 for score in found.scores.values())
        assert any(found.scores.values())
        assert (found.spectra is not None) == (metric in SPECTRAL_METRICS)
        for spectra in [found.spectra] if found.spectra else []:
            assert list(spectra) == names
            for site in context.sites:
                values = np.array(spectra[site.name])
                assert 1 <= len(values) <= min(256, site.max_rank)
                assert (np.diff(values) <= 0).all()
                assert (values >= 0).all()

    def test_halves(self, context: StudyContext, metric: str) -> None:
        found = profile(context, metric)
        if metric in WEIGHTS_ONLY:
            assert found.replicates == ()
            assert math.isnan(found.stability)
            assert "weights alone" in found.stability_note
        else:
            assert len(found.replicates) == 2
            assert found.replicates[0] != found.replicates[1]
            assert -1 <= found.stability <= 1
            assert found.stability_note == ""
            assert found.tokens > 0
        for spectra in found.replicates:
            assert list(spectra) == list(found.scores)
            assert all(values for values in spectra.values())
        evidence = found.summary()
        assert evidence.replicates == found.replicates
        assert evidence.spectra == found.spectra

    def test_same_seed_same_profile(self, context: StudyContext, metric: str) -> None:
        one, same, other = (profile(context, metric, seed) for seed in (0, 0, 1))
        assert timeless(one) == timeless(same)
        assert (one.scores == other.scores) == (metric in WEIGHTS_ONLY)

    def test_model_is_left_as_it_was(self, context: StudyContext, metric: str) -> None:
        model = context.base.model
        model.train()
        model.transformer.h[1].eval()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 == 0)
            if index % 2:
                parameter.grad = torch.full_like(parameter, 0.5)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        before = state(model)
        profile(context, metric)
        assert state(model) == before
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for index, parameter in enumerate(model.parameters()):
            assert (parameter.grad is None) == (index % 2 == 0)
            assert parameter.grad is None or bool((parameter.grad == 0.5).all())

    def test_json_round_trip(self, context: StudyContext, metric: str) -> None:
        found = profile(context, metric)
        read = ImportanceProfile.from_json(found.to_json())
        assert read.to_dict() == found.to_dict()
        assert read.spectra == found.spectra
        assert read.replicates == found.replicates

    def test_many_passes_equal_one(self, context: StudyContext, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
        one = profile(context, metric, limits=PassLimits())
        monkeypatch.setattr(passes, "PASS_TOKENS", 1)
        assert len(passes.halved(context.calibration(0, 0), divide=True)) == 12
        many = profile(context, metric, limits=PassLimits())
        for name, score in one.scores.items():
            # `ablation` is a difference of two losses: it keeps their rounding
            assert many.scores[name] == pytest.approx(score, rel=1e-3, abs=2e-6)
        assert many.stability == pytest.approx(one.stability, abs=1e-6, nan_ok=True)
        for first, second in zip(one.replicates, many.replicates, strict=True):
            for name in first:
                np.testing.assert_allclose(first[name], second[name], rtol=1e-2, atol=1e-6)

    def test_bf16_base_agrees(self, make_bench: BaseContext, metric: str) -> None:
        full, half = (make_bench(precision=p, profile_batches=4) for p in ("fp32", "bf16"))
        exact, rounded = (list(profile(b, metric).scores.values()) for b in (full, half))
        assert np.corrcoef(exact, rounded)[0, 1] > 0.9


def test_a_profile_of_nothing_is_an_error(context: StudyContext) -> None:
    def constant(model: nn.Module, batch: Batch) -> torch.Tensor:
        return causal_loss(model, batch) * 0

    with pytest.raises(AllocationError, match=r"every site scores 0.*more calibration batches"):
        profile(context, "weight_gradient", loss=constant)


def test_a_broken_base_is_an_error(context: StudyContext) -> None:
    with torch.no_grad():
        context.base.model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="loss on the calibration data is nan"):
        profile(context, "weight_gradient")


def test_one_example_has_no_stability(make_bench: BaseContext) -> None:
    found = profile(make_bench(profile_batches=1, profile_batch_size=1), "weight_gradient")
    assert math.isnan(found.stability)
    assert found.stability_note


def test_padding_changes_nothing(context: StudyContext) -> None:
    task = context.profile_task(seed=0, fold=0)
    (whole,) = passes.joined(task.batches)
    wider = Batch.of_text(
        input_ids=nn.functional.pad(whole.input_ids, (0, 5), value=7),
        attention_mask=nn.functional.pad(whole.attention_mask, (0, 5)),
        labels=nn.functional.pad(whole.labels, (0, 5), value=-100),
    )
    for metric in PROFILERS:
        one, other = (profile(context, metric, batches=batches) for batches in ([whole], [wider]))
        for name, score in one.scores.items():
            assert other.scores[name] == pytest.approx(score, rel=1e-3, abs=1e-9), metric


# Capture


class Flat(nn.Module):
    """Two blocks that share one map, on rows flattened over examples, with an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(258, 6)
        self.h = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 6), "off": Conv1D(4, 6)})])
        self.head = nn.Linear(6, 258)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        rows = self.embed(input_ids).flatten(0, 1)
        for _ in range(2):
            rows = torch.tanh(self.h[0]["up"](rows)) + rows
        return type("Output", (), {"logits": self.head(rows).view(*input_ids.shape, -1)})()


def test_shared_and_unused_maps(context: StudyContext) -> None:
    from adaptive_lora.models.sites import find_sites

    torch.manual_seed(0)
    model = Flat()
    plain = {"model": model, "sites": find_sites(model), "running": lambda model: nullcontext()}
    task = dataclasses.replace(context.profile_task(seed=0, fold=0), **plain)
    found = profile_importance(task, metric="gradient_norm", seed=0)
    loss = sum(causal_loss(model, batch) for batch in task.batches)
    (gradient,) = torch.autograd.grad(loss, model.h[0]["up"].weight)
    assert found.scores["h.0.up"] == pytest.approx(float(gradient.norm()) / found.tokens, rel=1e-4)
    assert found.scores["h.0.off"] == 0
    variance = profile_importance(task, metric="gradient_variance", seed=0)
    each = []
    for batch in task.batches:
        for row in range(len(batch.input_ids)):
            single = batch.rows([row])
            each.append(torch.autograd.grad(causal_loss(model, single), model.h[0]["up"].weight)[0])
    assert variance.scores["h.0.up"] == pytest.approx(float(torch.stack(each).var(dim=0).mean()), rel=1e-3)


def test_passes_join_up_to_a_limit() -> None:
    def batch(rows: int, width: int) -> Batch:
        ids = torch.ones(rows, width, dtype=torch.long)
        return Batch.of_text(input_ids=ids, attention_mask=ids.clone(), labels=ids.clone())

    one, *rest = passes.halved([batch(2, 3), batch(1, 4), batch(1, 9), batch(1, 2)], limit=12)
    assert [tuple(each.batch.input_ids.shape) for each in (one, *rest)] == [(3, 4), (1, 9), (1, 2)]
    assert one.batch.labels.tolist() == [[1, 1, 1, -100], [1, 1, 1, 1], [1, 1, 1, -100]]
    assert one.batch.attention_mask[2].tolist() == [1, 1, 1, 0]
    assert [each.split for each in (one, *rest)] == [2, 0, 1]
    assert rest[0].half(0) is None
    assert one.half(1).input_ids.shape == (1, 4)


def test_groups_hold_no_more_than_the_models_own_gradient(context: StudyContext) -> None:
    def floats(site: object) -> int:
        return 2 * site.in_features * site.out_features  # type: ignore[attr-defined]

    own = sum(site.in_features * site.out_features for site in context.sites)
    groups = passes.grouped(context.sites, floats, own)
    assert [site for group in groups for site in group] == list(context.sites)
    assert all(sum(map(floats, group)) <= own or len(group) == 1 for group in groups)
    assert len(passes.grouped(context.sites, floats, 0)) == len(context.sites)


def test_one_site_at_a_time(context: StudyContext, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptive_lora.methods.importance import gradient

    alive, most = 0, 0

    class Counted(gradient.SiteSums):
        def __init__(self, *given: object) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            super().__init__(*given)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(gradient, "SiteSums", Counted)
    profile(context, "gradient_variance", limits=PassLimits())
    assert (alive, most) == (0, 1)


def test_the_command_logs_cost_and_draws_the_spectrum(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    config = in_store(profile_batches=2, profile_batch_size=2, max_steps=None, epochs=2)
    run_profiles(config, ["whitened_gradient"], Console(quiet=True))
    client = MlflowClient(store_in(tmp_path))
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    examples = StudyContext(config).splits(0).train
    per_training = 2 * sum(len(example.input_ids) for example in examples)
    share = run.data.metrics["profile/processed_tokens"] / per_training
    assert run.data.metrics["profile/share_of_training_tokens"] == pytest.approx(share, rel=0.2)
    drawn = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
    assert drawn == {"figures/profile_whitened_gradient.png", "figures/spectrum_whitened_gradient.png"}


def test_a_trial_reports_the_share_of_its_training(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="empirical:rank=1", profile_batches=2)
    trial = next(context.config.trials())
    outcome = run_trial(context, trial, tmp_path / "adapter")
    metrics = trial_metrics(context, outcome, 0)
    assert metrics["profile/share_of_training"] == pytest.approx(metrics["profile/seconds"] / metrics["train_seconds"])
