"""The size parameter of a tuner under a budget: the largest value that fits."""

from __future__ import annotations

from collections.abc import Callable

from adaptive_lora.errors import AllocationError


def largest(cost: Callable[[int], int], budget: int, what: str) -> int:
    """Return the largest integer from 1 whose cost is within the budget.

    Args:
        cost: function from a value to its number of parameters, increasing.
        budget: maximum number of parameters.
        what: noun for the value in messages, such as `virtual token`.

    Raises:
        AllocationError: the value 1 already costs more than the budget.
    """
    if cost(1) > budget:
        raise AllocationError(f"budget of {budget:,} parameters is too small: one {what} already costs {cost(1):,}.")
    low, high = 1, 2
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def within(parameters: int, budget: int | None, what: str) -> None:
    """Check that a tuner without a size parameter, or with one given, is within the budget.

    Raises:
        AllocationError: it costs more; the message gives the cost.
    """
    if budget is not None and parameters > budget:
        raise AllocationError(
            f"{what} trains {parameters:,} parameters, above the budget of {budget:,}; raise the "
            "budget, or leave it out."
        )


def unused_note(parameters: int, budget: int | None, what: str) -> tuple[str, ...]:
    """Return a sentence if a method without a size parameter is below its budget."""
    if budget is None or parameters == budget:
        return ()
    return (f"{what} has no size parameter: of {budget:,} parameters it uses {parameters:,}, the nearest below.",)
