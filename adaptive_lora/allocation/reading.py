"""Reading a method's options: which class has them, and what is wrong with them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.controls import Control
from adaptive_lora.errors import ConfigError, unknown_name

LIMITS: Mapping[str, int | None] = {
    "min_rank": None,
    "max_rank": None,
    "multiple": 1,
    "attention_cap": None,
    "feed_forward_cap": None,
}
"""Options that limit the ranks of every method which plans them before training -> no limit."""


def decides_in_training(kind: Any) -> bool:
    """Return whether a method's ranks are not known before training.

    So it is with every method that has a recipe of its own, unless it says otherwise. Families that
    give no ranks have none to hold to either.
    """
    return bool(getattr(kind, "ranks_in_training", hasattr(kind, "recipe")))


def wrapped_kind(name: str, of: object) -> Any:
    """Return the options class of the method that a control arm wraps; None for other methods.

    Raises:
        ConfigError: no such method, or a control arm of a control arm.
    """
    kind = METHODS[name]
    if not issubclass(kind, Control):
        return None
    if of is None:
        return type(next(field.default for field in dataclasses.fields(kind) if field.name == "of"))
    plain = [
        other
        for other, options in METHODS.usable()
        if not issubclass(options, Control) and not decides_in_training(options)
    ]
    if of not in plain:
        raise ConfigError(f"{name}: of: {unknown_name('method', str(of), plain)}")
    return METHODS[str(of)]


def is_family(kind: Any) -> bool:
    """Return whether a method gives no ranks: prompts, bottlenecks, weights of the base."""
    return hasattr(kind, "design")


def family_problem(name: str, kind: Any, changed: Sequence[str]) -> str | None:
    """Return what is wrong with options about ranks on a method that gives none, or None.

    Args:
        name: of the method.
        kind: its options class.
        changed: options of all methods that were given a value of their own.
    """
    senseless = sorted(set(changed) - {"budget"})
    if not is_family(kind) or not senseless:
        return None
    return f"{name} gives no ranks, so it takes no {', '.join(senseless)}; leave that out"


def limits_problem(name: str, kind: Any, parsed: Mapping[str, Any]) -> str | None:
    """Return what is wrong with limits on a method that cannot hold them, or None."""
    unmet = [limit for limit, default in LIMITS.items() if parsed.get(limit, default) != default]
    held = not decides_in_training(kind) or getattr(kind, "holds_limits", False)
    if is_family(kind) or not unmet or held:
        return None
    return f"{name} finds its ranks by a recipe that cannot hold {', '.join(unmet)}; leave that out"


def budget_problem(budget: str | None) -> str | None:
    """Return what is wrong with a budget, or None."""
    if budget is None:
        return None
    number = budget.removeprefix("uniform-")
    if number.isdecimal() and len(number) <= 18 and int(number) > 0:
        return None
    return f"budget must be a whole number of parameters or uniform-R; got '{budget:.80}'"
