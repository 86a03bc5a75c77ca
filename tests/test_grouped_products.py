"""Grouped products of several trials' adapters give what each trial's own products give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adaptive_lora.methods.adapters.attach import ADAPTER
from adaptive_lora.training.joint import grouped
from adaptive_lora.training.joint.grouped import GroupedSite, Routing, Share

WIDTH, OUT = 16, 24
RANKS = (3, 9, None, 1)
"""Of four trials, of which one leaves the site out."""
ROWS = (5, 2, 4, 7)


def layer(base: nn.Linear, rank: int, dropout: float = 0.0) -> Any:
    """Return a LoRA layer on a base, with a B that does something."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=["0"], lora_dropout=dropout)
    found: Any = get_peft_model(nn.Sequential(base), config).base_model.model[0]  # type: ignore[arg-type]
    nn.init.normal_(found.lora_B[ADAPTER].weight, std=0.2)
    return found


def site(
    ranks: Sequence[int | None] = RANKS, rows: Sequence[int] = ROWS, width: int = WIDTH, dropout: float = 0.0
) -> GroupedSite:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = nn.Linear(width, OUT).requires_grad_(False)
        layers = {i: layer(base, r, dropout) for i, r in enumerate(ranks) if r is not None}
    routing = Routing()
    routing.shares = [Share(member=i, rows=count, width=1) for i, count in enumerate(rows)]
    return GroupedSite(base, layers, routing)


def inputs(columns: int = 1, width: int = WIDTH) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(sum(ROWS), columns, width, generator=draw).requires_grad_()


def outcome(module: GroupedSite, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of inputs and adapters."""
    trained = [p for p in module.layers.parameters() if p.requires_grad]
    out = module(x)
    slope = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * slope).sum(), [x, *trained])]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function by which sites loop over the trials from then on."""
    return lambda: monkeypatch.setattr(grouped, "suits_groups", lambda *given: False)


def no_loop(*given: Any) -> torch.Tensor:
    raise AssertionError("a loop over the trials")


@pytest.mark.parametrize("columns", [1, 3], ids=["packed", "padded"])
def test_they_are_those_of_the_loop(columns: int, loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = site(), inputs(columns)
    with monkeypatch.context() as patch:
        patch.setattr(grouped, "_update", no_loop)
        found = outcome(module, x)
    loop()
    for one, other in zip(found, outcome(module, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_autocasts_type_is_used_as_near_to_float32(loop: Any) -> None:
    module, x = site(), inputs()
    exact = outcome(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(module, x)
        loop()
        looped = outcome(module, x)
    for one, other, wanted in zip(found, looped, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - wanted).norm() < 1.3 * (other - wanted).norm()
        assert not torch.equal(one, wanted)


def test_a_trial_that_is_nan_stays_by_itself() -> None:
    module, x = site(), inputs()
    clean = outcome(module, x)
    with torch.no_grad():
        module.layers["1"].lora_A[ADAPTER].weight.fill_(torch.nan)  # type: ignore[index, union-attr]
        x[ROWS[0] : ROWS[0] + ROWS[1]] = torch.inf
    found = outcome(module, x)
    own = slice(ROWS[0], ROWS[0] + ROWS[1])
    others = torch.ones(sum(ROWS), dtype=torch.bool)
    others[own] = False
    assert found[0][own].isnan().all()
    for one, other in zip(found[:2], clean[:2], strict=True):  # outputs and the inputs' gradient
        torch.testing.assert_close(one[others], other[others])
    names = [name for name, p in module.layers.named_parameters() if p.requires_grad]
    for name, one, other in zip(names, found[2:], clean[2:], strict=True):
        if name.startswith("1."):
            assert not one.isfinite().any()
        else:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reason", ["dropout", "width", "float64"])
def test_what_does_not_suit_loops(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 15 if reason == "width" else WIDTH
    module = site(width=width, dropout=0.5 if reason == "dropout" else 0.0)
    x = inputs(width=width)
    if reason == "float64":
        module, x = module.double(), x.double()
    seen, update = [], grouped._update

    def counted(*given: Any) -> torch.Tensor:
        seen.append(given)
        return update(*given)

    monkeypatch.setattr(grouped, "_update", counted)
    module(x)
    assert len(seen) == 3


def test_a_site_that_all_leave_out_is_the_base() -> None:
    module, x = site(ranks=(None,) * 4), inputs()
    torch.testing.assert_close(module(x), module.base_layer(x))


def test_more_trials_do_not_take_more_operations(loop: Any) -> None:
    def operations(count: int) -> int:
        rows = (1,) * (count - 1) + (sum(ROWS) - count + 1,)
        module, x = site(ranks=(4,) * count, rows=rows), inputs()
        with _Counts() as counted:
            module(x)
        return counted.products

    assert operations(8) == operations(2) == 3  # one of the base, two of the adapters
    loop()
    assert operations(8) == 1 + 2 * 8


class _Counts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += any(part in str(func) for part in ("mm.", "addmm", "grouped_mm"))
        return func(*args, **(kwargs or {}))
