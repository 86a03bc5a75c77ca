"""Each profiler against a brute-force computation in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiled import SITE, profile
from torch import nn

from adaptive_lora.data import Batch
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.importance.activation import Scatter
from adaptive_lora.methods.importance.capture import SiteRows
from adaptive_lora.methods.importance.gradient import MeanGradients, squared_norms
from adaptive_lora.methods.importance.moments import DAMPING, second_moment, whiten
from adaptive_lora.methods.importance.weights import heavy_tail
from adaptive_lora.methods.importance.whitened import gains
from adaptive_lora.models.losses import causal_loss
from adaptive_lora.runner.context import StudyContext

BaseContext = Callable[..., StudyContext]


@pytest.fixture
def context(make_bench: BaseContext) -> StudyContext:
    return make_bench(profile_batches=4, profile_batch_size=3)


def example_gradients(context: StudyContext, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (E, out, in) gradients of single examples' summed loss, and their token counts."""
    model = context.base.model.double()
    weight = model.get_submodule(name).weight.requires_grad_(True)
    gradients, tokens = [], []
    for batch in context.profile_task(seed=0, fold=0).batches:
        for row in range(len(batch.input_ids)):
            single = Batch.of_text(
                input_ids=batch.input_ids[row : row + 1],
                attention_mask=batch.attention_mask[row : row + 1],
                labels=batch.labels[row : row + 1],
            )
            (gradient,) = torch.autograd.grad(causal_loss(model, single), weight)
            gradients.append(gradient.T)
            tokens.append(single.supervised_tokens)
    weight.requires_grad_(False)
    return torch.stack(gradients), torch.tensor(tokens)


def test_weight_gradient_and_norm_equal_autograd(context: StudyContext) -> None:
    found = {metric: profile(context, metric) for metric in ("weight_gradient", "gradient_norm")}
    each, tokens = example_gradients(context, SITE)
    weight = context.base.model.get_submodule(SITE).weight.T
    parts = (slice(None), slice(0, None, 2), slice(1, None, 2))
    for index, part in enumerate(parts):
        mean = each[part].sum(dim=0) / tokens[part].sum()
        spectra = found["gradient_norm"].spectra, *found["gradient_norm"].replicates
        np.testing.assert_allclose(spectra[index][SITE], torch.linalg.svdvals(mean).square(), rtol=1e-3, atol=1e-9)
        scores = found["weight_gradient"].replicates
        if index:
            assert scores[index - 1][SITE][0] == pytest.approx(float((weight * mean).abs().mean()), rel=1e-4)
        else:
            assert found["weight_gradient"].scores[SITE] == pytest.approx(float((weight * mean).abs().mean()), rel=1e-4)
            assert found["gradient_norm"].scores[SITE] == pytest.approx(float(mean.norm()), rel=1e-4)


def test_variance_equals_a_loop_over_examples(context: StudyContext) -> None:
    found = profile(context, "gradient_variance")
    each, _ = example_gradients(context, SITE)
    assert found.scores[SITE] == pytest.approx(float(each.var(dim=0).mean()), rel=1e-3)
    assert found.replicates[1][SITE][0] == pytest.approx(float(each[1::2].var(dim=0).mean()), rel=1e-3)


def test_squared_norms_take_the_cheaper_way() -> None:
    draw = torch.Generator().manual_seed(0)
    for length in (2, 50):
        x, d = (torch.randn(3, length, size, generator=draw) for size in (8, 6))
        expected = torch.einsum("bto,bti->boi", d, x).square().sum(dim=(1, 2))
        rows = SiteRows(
            inputs=x.flatten(0, 1), gradients=d.flatten(0, 1), mask=torch.ones(3 * length, dtype=torch.bool),
            lengths=[length] * 3, split=2, tokens=(1, 1), shared={},
        )  # fmt: skip
        torch.testing.assert_close(squared_norms(rows).float(), expected, rtol=1e-4, atol=1e-4)


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
    whole, _, _ = gains(MeanGradients(stack=stack, tokens=(5, 5)), outputs[None], inputs[None], damping=0.0)
    left, right = root(outputs, -0.5), root(inputs, -0.5)
    u, s, vh = torch.linalg.svd(left @ gradient @ right)
    for rank in range(1, 7):
        update = -left @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ right
        change = (gradient * update).sum() + torch.trace(outputs @ update @ inputs @ update.T) / 2
        assert sum(whole.spectrum[:rank]) == pytest.approx(-float(change), rel=1e-9)


@pytest.mark.parametrize("block", [2, 3, 7, 128])
def test_whitening_in_blocks(block: int) -> None:
    draw = torch.Generator().manual_seed(1)
    gradient = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    sides = []
    factors = []
    for size in (5, 7):
        rows = torch.randn(30, size, generator=draw, dtype=torch.float64)
        factors.append(second_moment(rows, block))
        width = -(-size // -(-size // block))
        same = torch.arange(size)[:, None] // width == torch.arange(size) // width
        dense = (rows.T @ rows) * same
        sides.append(dense + 0.2 * dense.trace() / size * torch.eye(size, dtype=dense.dtype))
    expected = root(sides[0], -0.5) @ gradient @ root(sides[1], -0.5)
    torch.testing.assert_close(
        torch.linalg.svdvals(whiten(gradient, *factors, damping=0.2)), torch.linalg.svdvals(expected)
    )


def test_whitened_gradient_equals_dense_kfac(context: StudyContext) -> None:
    found = profile(context, "whitened_gradient")
    each, tokens = example_gradients(context, SITE)
    inputs, outputs = kfac_factors(context, SITE)
    total = tokens.sum()
    share = [tokens[half::2].sum() / total for half in (0, 1)]
    whitened = [
        root(outputs, -0.5) @ each[half::2].sum(dim=0) / tokens[half::2].sum() @ root(inputs, -0.5) for half in (0, 1)
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


def kfac_factors(context: StudyContext, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return damped K-FAC factors of a site by one loop over examples, in float64."""
    model, seen = context.base.model.double(), []

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
        for batch in context.profile_task(seed=0, fold=0).batches:
            for row in range(len(batch.input_ids)):
                length = int(batch.attention_mask[row].sum())
                single = Batch.of_text(
                    input_ids=batch.input_ids[row : row + 1, :length],
                    attention_mask=batch.attention_mask[row : row + 1, :length],
                    labels=batch.labels[row : row + 1, :length],
                )
                causal_loss(model, single).backward()
                supervised += single.supervised_tokens
    x = torch.cat([given for given, _ in seen])
    g = torch.cat([output.grad[0] for _, output in seen])
    factors = x.T @ x / len(x), g.T @ g / supervised
    return tuple(m + DAMPING * m.trace() / len(m) * torch.eye(len(m)) for m in factors)  # type: ignore[return-value]


def test_pure_noise_gains_nothing_and_signal_stands_out() -> None:
    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 40, 60, generator=draw, dtype=torch.float64)
    signal = torch.zeros(40, 60, dtype=torch.float64)
    signal[range(3), range(3)] = torch.tensor([60.0, 50.0, 40.0], dtype=torch.float64)
    eye = torch.eye(40, dtype=torch.float64)[None], torch.eye(60, dtype=torch.float64)[None]

    def measured(first: torch.Tensor, second: torch.Tensor) -> tuple[float, ...]:
        stack = torch.stack([(first + second) / 2, first, second])
        whole, _, _ = gains(MeanGradients(stack=stack, tokens=(9, 9)), *eye, damping=0.0)
        return whole.spectrum

    assert sum(measured(*noise)) < 0.05 * float(((noise[0] + noise[1]) / 2).square().sum()) / 2
    found = np.array(measured(signal + noise[0], signal + noise[1]))
    np.testing.assert_allclose(found[:3], np.array([60, 50, 40]) ** 2 / 2, rtol=0.1)
    assert found[3:].sum() < 0.02 * found[:3].sum()


def inputs_of(context: StudyContext, name: str) -> list[torch.Tensor]:
    """Return the inputs (tokens, in) of a site, float64, for every calibration example."""
    model, seen = context.base.model.double(), []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, given, output: seen.append(given[0].detach()[0])
    )
    with torch.no_grad():
        for batch in context.profile_task(seed=0, fold=0).batches:
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                model(input_ids=row[mask.bool()][None])
    handle.remove()
    return seen


def test_activation_spectrum_equals_a_full_decomposition(context: StudyContext) -> None:
    found = profile(context, "activation_spectrum")
    seen = inputs_of(context, SITE)
    assert found.spectra is not None
    for values, part in (
        (found.spectra[SITE], seen),
        (found.replicates[0][SITE], seen[::2]),
        (found.replicates[1][SITE], seen[1::2]),
    ):
        rows = torch.cat(part)
        squares = torch.linalg.svdvals(rows - rows.mean(dim=0)).square()
        np.testing.assert_allclose(values, squares / squares.sum(), rtol=1e-3, atol=1e-7)
    shares = np.array(found.spectra[SITE])
    assert found.scores[SITE] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_activation_spectrum_equals_pefts(context: StudyContext) -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    rows = torch.cat(inputs_of(context, SITE)).float()
    reference = IncrementalPCA(n_components=8).partial_fit(rows.clone())
    scatter = Scatter()
    scatter.add(rows)
    torch.testing.assert_close(
        scatter.shares()[:8].float(), reference.explained_variance_ratio_.float(), rtol=1e-3, atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 59), width=st.sampled_from([5, 12, 80]))
def test_scatter_of_parts_is_that_of_the_whole(seed: int, cut: int, width: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, width, generator=draw) * torch.linspace(3, 0.1, width) + 2
    parts, whole = Scatter(), Scatter()
    parts.add(rows[:cut])
    parts.condense()
    parts.add(rows[cut:])
    whole.add(rows)
    assert parts.count == whole.count == 60
    assert parts.total == pytest.approx(whole.total, rel=1e-4)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.shares(), whole.shares(), rtol=1e-3, atol=1e-5)


def test_a_cut_scatter_keeps_its_leading_components() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 40, generator=draw) * 0.5 ** torch.arange(40)
    cut = Scatter(limit=8)
    for part in rows.split(50):
        cut.add(part)
        cut.condense()
    assert len(cut.kept) == 8
    whole = Scatter()
    whole.add(rows)
    torch.testing.assert_close(cut.shares()[:6], whole.shares()[:6], rtol=2e-2, atol=1e-6)


def test_weight_metrics_equal_their_formulas(context: StudyContext) -> None:
    weight = context.base.model.get_submodule(SITE).weight.detach().double().numpy()
    values = np.sort(np.linalg.svd(weight, compute_uv=False) ** 2)  # ascending
    count = len(values)
    k = count // 2
    hill = 1 + k / sum(np.log(values[count - i] / values[count - k - 1]) for i in range(1, k + 1))
    expected = {
        "heavy_tail": hill,
        "stable_rank": values.sum() / values[-1],
        "condition_number": 1 / np.linalg.cond(weight),
    }
    for metric, value in expected.items():
        assert profile(context, metric).scores[SITE] == pytest.approx(value, rel=1e-5)


def test_heavy_tail_finds_the_exponent_of_a_power_law() -> None:
    draw = np.random.default_rng(0)
    for exponent in (2.5, 4.0):
        sample = np.sort((1 - draw.random(4000)) ** (-1 / (exponent - 1)))[::-1]
        assert heavy_tail(torch.from_numpy(sample.copy())) == pytest.approx(exponent, rel=0.1)


def test_ablation_equals_the_loss_without_an_adapter(context: StudyContext) -> None:
    task = context.profile_task(seed=0, fold=0)
    found = profile(context, "ablation")
    assert task.trained is not None
    with task.trained() as probe, torch.no_grad():
        probe.model.eval()

        def loss() -> float:
            total = sum(causal_loss(task.model, batch) for batch in task.validation)
            return float(total) / sum(batch.supervised_tokens for batch in task.validation)

        whole = loss()
        for name, layer in lora_layers(task.model).items():
            kept = layer.lora_B["default"].weight.clone()
            layer.lora_B["default"].weight.zero_()
            assert found.scores[name] == pytest.approx(max(0.0, loss() - whole), abs=2e-6)
            layer.lora_B["default"].weight.copy_(kept)
    assert found.processed_tokens > probe.tokens


def test_output_energy_equals_what_the_adapter_adds(context: StudyContext) -> None:
    task = context.profile_task(seed=0, fold=0)
    found = profile(context, "output_energy")
    assert task.trained is not None
    with task.trained() as probe, torch.no_grad():
        probe.model.eval()
        layer, energy, positions = lora_layers(task.model)[SITE], 0.0, 0

        def add(module: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
            nonlocal energy
            energy += float((output - layer.base_layer(given[0])).square().sum())

        layer.register_forward_hook(add)
        for batch in task.batches:
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                task.model(input_ids=row[mask.bool()][None])
                positions += int(mask.sum())
    assert found.scores[SITE] == pytest.approx(energy / positions, rel=1e-3)


@pytest.mark.parametrize("metric", ["ablation", "output_energy"])
def test_without_a_training_there_is_nothing_to_ablate(context: StudyContext, metric: str) -> None:
    with pytest.raises(AllocationError, match=r"required a training .*Use a metric of the frozen"):
        profile(context, metric, trained=None)
