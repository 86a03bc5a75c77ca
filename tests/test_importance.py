"""Profilers: one contract for all, and each against a brute-force computation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import METRICS
from adaptive_lora.data import Batch
from adaptive_lora.errors import AllocationError, ModelError
from adaptive_lora.importance import (
    PROFILERS,
    ImportanceProfile,
    capture,
    profile_importance,
)
from adaptive_lora.importance.gradient import MeanGradients, squared_norms
from adaptive_lora.importance.whitened import gains, whiten
from adaptive_lora.losses import causal_loss
from adaptive_lora.workbench import Workbench

Bench = Callable[..., Workbench]
SPECTRAL = {"gradient_norm", "whitened_gradient"}
WEIGHTS_ONLY: set[str] = set()
SITE = "transformer.h.1.mlp.c_fc"


@pytest.fixture
def bench(make_bench: Bench) -> Workbench:
    return make_bench(profile_batches=4, profile_batch_size=3)


def profile(bench: Workbench, metric: str, seed: int = 0, **changes: object) -> ImportanceProfile:
    """Measure a profile without the workbench's cache."""
    task = dataclasses.replace(bench.profile_task(seed=seed, fold=0), **changes)  # type: ignore[arg-type]
    return profile_importance(task, metric=metric, seed=seed)


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

    def test_scores_and_spectra(self, bench: Workbench, metric: str) -> None:
        found = profile(bench, metric)
        names = [site.name for site in bench.sites]
        assert list(found.scores) == names
        assert all(math.isfinite(score) and score >= 0 for score in found.scores.values())
        assert any(found.scores.values())
        assert (found.spectra is not None) == (metric in SPECTRAL)
        for spectra in [found.spectra] if found.spectra else []:
            assert list(spectra) == names
            for site in bench.sites:
                values = np.array(spectra[site.name])
                assert 1 <= len(values) <= min(256, site.max_rank)
                assert (np.diff(values) <= 0).all()
                assert (values >= 0).all()

    def test_halves(self, bench: Workbench, metric: str) -> None:
        found = profile(bench, metric)
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
        evidence = found.evidence()
        assert evidence.replicates == found.replicates
        assert evidence.spectra == found.spectra

    def test_same_seed_same_profile(self, bench: Workbench, metric: str) -> None:
        one, same, other = (profile(bench, metric, seed) for seed in (0, 0, 1))
        assert timeless(one) == timeless(same)
        assert (one.scores == other.scores) == (metric in WEIGHTS_ONLY)

    def test_model_is_left_as_it_was(self, bench: Workbench, metric: str) -> None:
        model = bench.base.model
        model.train()
        model.transformer.h[1].eval()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 == 0)
            if index % 2:
                parameter.grad = torch.full_like(parameter, 0.5)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        before = state(model)
        profile(bench, metric)
        assert state(model) == before
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for index, parameter in enumerate(model.parameters()):
            assert (parameter.grad is None) == (index % 2 == 0)
            assert parameter.grad is None or bool((parameter.grad == 0.5).all())

    def test_json_round_trip(self, bench: Workbench, metric: str) -> None:
        found = profile(bench, metric)
        read = ImportanceProfile.from_json(found.to_json())
        assert read.to_dict() == found.to_dict()
        assert read.spectra == found.spectra
        assert read.replicates == found.replicates

    def test_many_passes_equal_one(
        self, bench: Workbench, metric: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = profile(bench, metric)
        monkeypatch.setattr(capture, "PASS_TOKENS", 1)
        many = profile(bench, metric)
        for name, score in one.scores.items():
            assert many.scores[name] == pytest.approx(score, rel=1e-3)
        assert many.stability == pytest.approx(one.stability, abs=1e-6, nan_ok=True)
        for first, second in zip(one.replicates, many.replicates, strict=True):
            for name in first:
                np.testing.assert_allclose(first[name], second[name], rtol=1e-2, atol=1e-6)

    def test_bf16_base_agrees(self, make_bench: Bench, metric: str) -> None:
        full, half = (make_bench(precision=p, profile_batches=4) for p in ("fp32", "bf16"))
        exact, rounded = (list(profile(b, metric).scores.values()) for b in (full, half))
        assert np.corrcoef(exact, rounded)[0, 1] > 0.9


def test_a_profile_of_nothing_is_an_error(bench: Workbench) -> None:
    def constant(model: nn.Module, batch: Batch) -> torch.Tensor:
        return causal_loss(model, batch) * 0

    with pytest.raises(AllocationError, match=r"every site scores 0.*more calibration batches"):
        profile(bench, "weight_gradient", loss=constant)


def test_a_broken_base_is_an_error(bench: Workbench) -> None:
    with torch.no_grad():
        bench.base.model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="loss on the calibration data is nan"):
        profile(bench, "weight_gradient")


def test_one_example_has_no_stability(make_bench: Bench) -> None:
    found = profile(make_bench(profile_batches=1, profile_batch_size=1), "weight_gradient")
    assert math.isnan(found.stability)
    assert found.stability_note


def test_padding_changes_nothing(bench: Workbench) -> None:
    task = bench.profile_task(seed=0, fold=0)
    (whole,) = capture.joined(task.batches)
    wider = Batch(
        input_ids=nn.functional.pad(whole.input_ids, (0, 5), value=7),
        attention_mask=nn.functional.pad(whole.attention_mask, (0, 5)),
        labels=nn.functional.pad(whole.labels, (0, 5), value=-100),
    )
    for metric in PROFILERS:
        one, other = (profile(bench, metric, batches=batches) for batches in ([whole], [wider]))
        for name, score in one.scores.items():
            assert other.scores[name] == pytest.approx(score, rel=1e-3, abs=1e-9), metric


# Brute force in float64


def example_gradients(bench: Workbench, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (E, out, in) gradients of single examples' summed loss, and their token counts."""
    model = bench.base.model.double()
    weight = model.get_submodule(name).weight.requires_grad_(True)
    gradients, tokens = [], []
    for batch in bench.profile_task(seed=0, fold=0).batches:
        for row in range(len(batch.input_ids)):
            single = Batch(
                input_ids=batch.input_ids[row : row + 1],
                attention_mask=batch.attention_mask[row : row + 1],
                labels=batch.labels[row : row + 1],
            )
            (gradient,) = torch.autograd.grad(causal_loss(model, single), weight)
            gradients.append(gradient.T)
            tokens.append(single.supervised_tokens)
    weight.requires_grad_(False)
    return torch.stack(gradients), torch.tensor(tokens)


def test_weight_gradient_and_norm_equal_autograd(bench: Workbench) -> None:
    found = {metric: profile(bench, metric) for metric in ("weight_gradient", "gradient_norm")}
    each, tokens = example_gradients(bench, SITE)
    weight = bench.base.model.get_submodule(SITE).weight.T
    parts = (slice(None), slice(0, None, 2), slice(1, None, 2))
    for index, part in enumerate(parts):
        mean = each[part].sum(dim=0) / tokens[part].sum()
        spectra = found["gradient_norm"].spectra, *found["gradient_norm"].replicates
        np.testing.assert_allclose(
            spectra[index][SITE], torch.linalg.svdvals(mean).square(), rtol=1e-3, atol=1e-9
        )
        scores = found["weight_gradient"].replicates
        if index:
            assert scores[index - 1][SITE][0] == pytest.approx(
                float((weight * mean).abs().mean()), rel=1e-4
            )
        else:
            assert found["weight_gradient"].scores[SITE] == pytest.approx(
                float((weight * mean).abs().mean()), rel=1e-4
            )
            assert found["gradient_norm"].scores[SITE] == pytest.approx(
                float(mean.norm()), rel=1e-4
            )


def test_variance_equals_a_loop_over_examples(bench: Workbench) -> None:
    found = profile(bench, "gradient_variance")
    each, _ = example_gradients(bench, SITE)
    assert found.scores[SITE] == pytest.approx(float(each.var(dim=0).mean()), rel=1e-3)
    assert found.replicates[1][SITE][0] == pytest.approx(
        float(each[1::2].var(dim=0).mean()), rel=1e-3
    )


def test_squared_norms_take_the_cheaper_way() -> None:
    draw = torch.Generator().manual_seed(0)
    for length in (2, 50):
        x, d = (torch.randn(3, length, size, generator=draw) for size in (8, 6))
        expected = torch.einsum("bto,bti->boi", d, x).square().sum(dim=(1, 2))
        torch.testing.assert_close(squared_norms(x, d).float(), expected, rtol=1e-4, atol=1e-4)


def root(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """Return a power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


def kfac(size: int, draw: torch.Generator) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=draw, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def test_gains_are_what_the_best_low_rank_update_takes_off() -> None:
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 8, generator=draw, dtype=torch.float64)
    outputs, inputs = kfac(6, draw), kfac(8, draw)
    stack = gradient.expand(3, 6, 8)  # equal halves: no noise
    whole, _, _ = gains(MeanGradients(stack=stack, tokens=(5, 5)), outputs, inputs, damping=0.0)
    left, right = root(outputs, -0.5), root(inputs, -0.5)
    u, s, vh = torch.linalg.svd(left @ gradient @ right)
    for rank in range(1, 7):
        update = -left @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ right
        change = (gradient * update).sum() + torch.trace(outputs @ update @ inputs @ update.T) / 2
        assert sum(whole.spectrum[:rank]) == pytest.approx(-float(change), rel=1e-9)


@pytest.mark.parametrize("diagonal", [(), ("out",), ("in",), ("out", "in")])
def test_whitening_with_diagonal_factors(diagonal: tuple[str, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    gradient = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    outputs, inputs = kfac(5, draw), kfac(7, draw)
    given = (
        outputs.diagonal() if "out" in diagonal else outputs,
        inputs.diagonal() if "in" in diagonal else inputs,
    )
    dense = [torch.diag(each) if each.ndim == 1 else each for each in given]
    damped = [m + 0.2 * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype) for m in dense]
    expected = root(damped[0], -0.5) @ gradient @ root(damped[1], -0.5)
    torch.testing.assert_close(
        torch.linalg.svdvals(whiten(gradient, *given, damping=0.2)),
        torch.linalg.svdvals(expected),
    )


def test_whitened_gradient_equals_dense_kfac(bench: Workbench) -> None:
    found = profile(bench, "whitened_gradient")
    each, tokens = example_gradients(bench, SITE)
    inputs, outputs = kfac_factors(bench, SITE)
    total = tokens.sum()
    share = [tokens[half::2].sum() / total for half in (0, 1)]
    whitened = [
        root(outputs, -0.5) @ each[half::2].sum(dim=0) / tokens[half::2].sum() @ root(inputs, -0.5)
        for half in (0, 1)
    ]
    noise = (share[0] * share[1]).sqrt() * (whitened[0] - whitened[1])
    edge = torch.linalg.svdvals(noise)[0] ** 2
    whole = share[0] * whitened[0] + share[1] * whitened[1]
    assert found.spectra is not None
    for values, matrix, scale in (
        (found.spectra[SITE], whole, 1),
        (found.replicates[0][SITE], whitened[0], 1 / share[0]),
        (found.replicates[1][SITE], whitened[1], 1 / share[1]),
    ):
        expected = (torch.linalg.svdvals(matrix).square() - edge * scale).clamp(min=0) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-2, atol=1e-5)
    assert found.scores[SITE] == pytest.approx(sum(found.spectra[SITE]), rel=1e-6)


def kfac_factors(bench: Workbench, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return damped K-FAC factors of a site by one loop over examples, in float64."""
    model, seen = bench.base.model.double(), []

    @contextmanager
    def watched() -> Iterator[None]:
        def keep(module: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            seen.append((given[0].detach()[0], output))

        handle = model.get_submodule(name).register_forward_hook(keep)
        model.get_input_embeddings().weight.requires_grad_(True)
        yield
        model.get_input_embeddings().weight.requires_grad_(False)
        handle.remove()

    supervised = 0
    with watched():
        for batch in bench.profile_task(seed=0, fold=0).batches:
            for row in range(len(batch.input_ids)):
                length = int(batch.attention_mask[row].sum())
                single = Batch(
                    input_ids=batch.input_ids[row : row + 1, :length],
                    attention_mask=batch.attention_mask[row : row + 1, :length],
                    labels=batch.labels[row : row + 1, :length],
                )
                causal_loss(model, single).backward()
                supervised += single.supervised_tokens
    x = torch.cat([given for given, _ in seen])
    g = torch.cat([output.grad[0] for _, output in seen])
    factors = x.T @ x / len(x), g.T @ g / supervised
    return tuple(m + 0.1 * m.trace() / len(m) * torch.eye(len(m)) for m in factors)  # type: ignore[return-value]


def test_pure_noise_gains_nothing_and_signal_stands_out() -> None:
    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 40, 60, generator=draw, dtype=torch.float64)
    signal = torch.zeros(40, 60, dtype=torch.float64)
    signal[range(3), range(3)] = torch.tensor([60.0, 50.0, 40.0], dtype=torch.float64)
    eye = torch.eye(40, dtype=torch.float64), torch.eye(60, dtype=torch.float64)

    def measured(first: torch.Tensor, second: torch.Tensor) -> tuple[float, ...]:
        stack = torch.stack([(first + second) / 2, first, second])
        whole, _, _ = gains(MeanGradients(stack=stack, tokens=(9, 9)), *eye, damping=0.0)
        return whole.spectrum

    assert sum(measured(*noise)) < 0.05 * float(((noise[0] + noise[1]) / 2).square().sum()) / 2
    found = np.array(measured(signal + noise[0], signal + noise[1]))
    np.testing.assert_allclose(found[:3], np.array([60, 50, 40]) ** 2 / 2, rtol=0.1)
    assert found[3:].sum() < 0.02 * found[:3].sum()


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


def test_shared_and_unused_maps(bench: Workbench) -> None:
    from adaptive_lora.sites import find_sites

    torch.manual_seed(0)
    model = Flat()
    task = dataclasses.replace(
        bench.profile_task(seed=0, fold=0), model=model, sites=find_sites(model)
    )
    found = profile_importance(task, metric="gradient_norm", seed=0)
    loss = sum(causal_loss(model, batch) for batch in task.batches)
    (gradient,) = torch.autograd.grad(loss, model.h[0]["up"].weight)
    assert found.scores["h.0.up"] == pytest.approx(float(gradient.norm()) / found.tokens, rel=1e-4)
    assert found.scores["h.0.off"] == 0
    variance = profile_importance(task, metric="gradient_variance", seed=0)
    each = []
    for batch in task.batches:
        for row in range(len(batch.input_ids)):
            single = Batch(**{
                field.name: getattr(batch, field.name)[row : row + 1]
                for field in dataclasses.fields(Batch)
            })  # fmt: skip
            each.append(torch.autograd.grad(causal_loss(model, single), model.h[0]["up"].weight)[0])
    assert variance.scores["h.0.up"] == pytest.approx(
        float(torch.stack(each).var(dim=0).mean()), rel=1e-3
    )


def test_passes_join_up_to_a_limit() -> None:
    def batch(rows: int, width: int) -> Batch:
        ids = torch.ones(rows, width, dtype=torch.long)
        return Batch(input_ids=ids, attention_mask=ids.clone(), labels=ids.clone())

    passes = capture.joined([batch(2, 3), batch(1, 4), batch(1, 9), batch(1, 2)], limit=12)
    assert [tuple(each.input_ids.shape) for each in passes] == [(3, 4), (1, 9), (1, 2)]
    assert passes[0].labels[0].tolist() == [1, 1, 1, -100]
    assert passes[0].attention_mask[0].tolist() == [1, 1, 1, 0]


def test_groups_hold_no_more_than_the_models_own_gradient(bench: Workbench) -> None:
    def floats(site: object) -> int:
        return 2 * site.in_features * site.out_features  # type: ignore[attr-defined]

    own = sum(site.in_features * site.out_features for site in bench.sites)
    groups = capture._groups(bench.sites, floats, own)
    assert [site for group in groups for site in group] == list(bench.sites)
    assert all(sum(map(floats, group)) <= own or len(group) == 1 for group in groups)
    assert len(capture._groups(bench.sites, floats, 0)) == len(bench.sites)


def test_one_site_at_a_time(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptive_lora.importance import gradient

    alive, most = 0, 0

    class Counted(gradient.HalfSums):
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            super().__init__()

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class CountedVariance(Counted, gradient._Variance):
        pass

    monkeypatch.setattr(gradient, "_Variance", CountedVariance)
    profile(bench, "gradient_variance")
    assert (alive, most) == (0, 1)
