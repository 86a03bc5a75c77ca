"""Products by oneDNN give what torch's own give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from adaptive_lora.models.kernels import products
from adaptive_lora.models.kernels.products import product

ROWS, INNER, OUTER = 37, 29, 23


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Send products of all sizes to oneDNN; return the products that stay with torch."""
    if not products._HERE:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_LEAST", 0)
    usual, seen = functional.linear, list[Any]()

    def linear(*args: Any) -> torch.Tensor:
        seen.append(args)
        return usual(*args)

    monkeypatch.setattr(products.functional, "linear", linear)
    return seen


def matrix(rows: int, columns: int, *, turned: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows)
    if turned:
        return torch.randn(columns, rows, generator=draw).t()
    return torch.randn(rows, columns, generator=draw)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("weight_turned", [False, True])
@pytest.mark.parametrize("inputs_turned", [False, True])
def test_they_are_those_of_float64(inputs_turned: bool, weight_turned: bool, biased: bool, calls: list[Any]) -> None:
    inputs = matrix(ROWS, INNER, turned=inputs_turned)
    weight = matrix(OUTER, INNER, turned=weight_turned)
    bias = torch.linspace(-1, 1, OUTER) if biased else None
    found = product(inputs, weight, bias)
    assert calls == []
    wanted = inputs.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_matrix_is_taken_as_it_stands(calls: list[Any]) -> None:
    inputs, weight = matrix(ROWS, INNER), matrix(3 * OUTER, INNER)[OUTER : 2 * OUTER]
    back = product(product(inputs, weight), weight.t())
    assert calls == []
    torch.testing.assert_close(back, inputs @ weight.t() @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_with_torch(dtype: torch.dtype, calls: list[Any]) -> None:
    inputs, weight = matrix(ROWS, INNER).to(dtype), matrix(OUTER, INNER).to(dtype)
    assert product(inputs, weight).dtype == dtype
    assert len(calls) == 1


def test_autocast_is_heeded(calls: list[Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(matrix(ROWS, INNER), matrix(OUTER, INNER)).dtype == torch.bfloat16
    assert len(calls) == 1


def test_small_products_stay_with_torch(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LEAST", 2 * ROWS * INNER * OUTER + 1)
    product(matrix(ROWS, INNER), matrix(OUTER, INNER))
    assert len(calls) == 1
