"""A family's one number under a budget: the largest that fits."""

from __future__ import annotations

from collections.abc import Callable

from adaptive_lora.errors import AllocationError


def largest(cost: Callable[[int], int], budget: int, what: str) -> int:
    """Return the largest whole number from 1 whose cost is within the budget.

    Args:
        cost: parameters at a value; grows with it.
        budget: most parameters.
        what: name of the value in messages, such as `virtual token`.

    Raises:
        AllocationError: one is already too many.
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
    """Check that what has no knob, or one that was set by hand, is within the budget.

    Raises:
        AllocationError: says what it costs.
    """
    if budget is not None and parameters > budget:
        raise AllocationError(
            f"{what} trains {parameters:,} parameters, above the budget of {budget:,}; raise the "
            "budget, or leave it out."
        )


def unused_note(parameters: int, budget: int | None, what: str) -> tuple[str, ...]:
    """Return a sentence where a method without a knob stays below its budget."""
    if budget is None or parameters == budget:
        return ()
    return (f"{what} has no knob for its size: of {budget:,} parameters it uses {parameters:,}, the nearest below.",)
