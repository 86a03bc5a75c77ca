"""The fused loss against float64, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.models.kernels import cross_entropy as tiles
from adaptive_lora.models.kernels.cross_entropy import Head, token_nll, token_scores

VOCABULARY, WIDTH, ROWS = 301, 12, 57


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks of 16 rows and tiles of 50 words, so that the last ones are smaller."""
    monkeypatch.setattr(tiles, "LOGITS", {"cpu": 16 * VOCABULARY})
    monkeypatch.setattr(tiles, "ROWS", 16)
    monkeypatch.setattr(tiles, "TILE", 50)


def data(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw) * scale
    targets = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    weights = torch.rand(ROWS, generator=draw)
    return hidden, targets, weights


def linear(*, bias: bool, trained: bool = False) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trained)


def reference(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    module: Any = head.module
    bias = None if module.bias is None else module.bias.double()
    logits = functional.linear(hidden, module.weight.double(), bias) * head.scale
    if head.softcap is not None:
        logits = (logits / head.softcap).tanh() * head.softcap
    return functional.cross_entropy(logits, targets, reduction="none")


HEADS = [
    {}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 0.5, "softcap": 2.0},
]  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("settings", HEADS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [1.0, 40.0], ids=["usual", "large-logits"])
def test_loss_and_gradient_are_those_of_float64(settings: dict[str, float], bias: bool, size: float) -> None:
    hidden, targets, weights = data(size)
    head = Head(module=linear(bias=bias), **settings)
    assert head.frozen
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found, wanted = token_nll(head, ours, targets), reference(head, exact, targets)
    (found * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6 * size)
    assert ours.grad is not None
    assert exact.grad is not None
    error = (ours.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-6 * max(1.0, size / 8)
    likely = head.logits(hidden).argmax(dim=-1)
    for words in (targets, likely):
        nll, correct = token_scores(head, hidden, words)
        wanted = reference(head, hidden.double(), words)
        torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=2e-6 * size)
        assert torch.equal(correct, likely == words)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_of_equally_likely_tokens_the_first_is_the_prediction(trained: bool) -> None:
    """As argmax has it: whether the equal ones stand in one tile or in two."""
    hidden, _, _ = data()
    head = Head(module=linear(bias=False, trained=trained))
    weight: Any = head.module.weight
    first, tied, later = 60, 70, 260
    with torch.no_grad():
        weight[tied] = weight[later] = weight[first] = 10 * hidden.mean(dim=0)
        chosen = hidden[head.logits(hidden).argmax(dim=-1) == first]
    assert len(chosen) > 5
    for word, right in ((first, True), (tied, False), (later, False)):
        _, correct = token_scores(head, chosen, torch.full((len(chosen),), word))
        assert correct.tolist() == [right] * len(chosen)


def test_tiles_serve_plain_heads_alone() -> None:
    hidden, targets, _ = data()

    class Doubled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    head = Head(module=Doubled(WIDTH, VOCABULARY).requires_grad_(False))
    assert not head.plain
    nll, _ = token_scores(head, hidden, targets)
    wanted = functional.cross_entropy(head.module(hidden), targets, reduction="none")
    torch.testing.assert_close(nll, wanted)


@pytest.mark.usefixtures("small_chunks")
def test_a_trained_head_gets_its_gradient_too() -> None:
    hidden, targets, _ = data()
    head = Head(module=linear(bias=True, trained=True), softcap=3.0)
    assert not head.frozen
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    parameters = list(head.module.parameters())
    found = torch.autograd.grad(token_nll(head, ours, targets).sum(), [ours, *parameters])
    loss = functional.cross_entropy(head.logits(plain), targets, reduction="sum")
    for one, other in zip(found, torch.autograd.grad(loss, [plain, *parameters]), strict=True):
        torch.testing.assert_close(one, other)


def test_no_row_is_no_loss() -> None:
    hidden, targets, _ = data()
    for trained in (False, True):
        head = Head(module=linear(bias=False, trained=trained))
        assert token_nll(head, hidden[:0], targets[:0]).shape == (0,)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_tensor_of_tokens_times_vocabulary_is_made(trained: bool) -> None:
    hidden, targets, _ = data()
    head = Head(module=linear(bias=False, trained=trained))
    largest = _Largest()
    with largest:
        token_nll(head, hidden.requires_grad_(), targets).sum().backward()
        token_scores(head, hidden, targets)
    assert largest.seen <= 16 * VOCABULARY < ROWS * VOCABULARY


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor):
                self.seen = max(self.seen, item.numel())
        return out
