"""Variants of LoRA that go with any allocation of ranks: DoRA, alpha and scaling, LoRA+, QLoRA.

They are options of every method (`MethodSpec`), so that the effects of an allocation and of a variant
can be separated: `waterfill:rank=8` beside `waterfill:rank=8,dora=true` and `uniform:rank=8,dora=true`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.problem import AllocationProblem, RankSolver, Solution
from adaptive_lora.errors import AllocationError

VARIANTS: Mapping[str, Any] = {
    "dora": False, "alpha": None, "scaling": None, "lora_plus": 1.0, "base": BaseStorage.FULL
}  # fmt: skip
"""Option of a variant -> its value for plain LoRA."""


def variant_problem(name: str, kind: Any, parsed: Mapping[str, Any]) -> str | None:
    """Return the problem with a variant on a method that does not train LoRA layers, or None."""
    refused: Mapping[str, str] = kind.refused_variants
    wrong = [
        f"{name} cannot have {option}: {why}"
        for option, why in refused.items()
        if parsed.get(option, VARIANTS[option]) != VARIANTS[option]
    ]
    return "; ".join(wrong) or None


def marks(spec: Any) -> list[str]:
    """Return a method's variants as items of its label."""
    words = {
        "dora": "dora",
        "alpha": f"alpha{spec.alpha or 0:g}",
        "scaling": str(spec.scaling),
        "lora_plus": f"plus{spec.lora_plus:g}",
        "base": spec.base,
    }
    return [word for name, word in words.items() if getattr(spec, name) != VARIANTS[name]]


def solve_with_magnitudes(method: RankSolver, problem: AllocationProblem) -> Solution:
    """Return ranks for DoRA, whose magnitudes (one per output of an adapted site) are charged first.

    A given budget covers ranks and magnitudes. Without one, the method's own budget (that of uniform
    rank R) covers ranks alone and the magnitudes are added, as for `uniform`. A site of rank 0 needs
    no magnitudes: it is excluded, and the parameters saved go to the other sites.

    Raises:
        AllocationError: the magnitudes alone use up the budget, or a control arm leaves sites out.
    """
    total, open_sites = problem.budget, [True] * len(problem.sites)
    while True:
        magnitudes = sum(
            site.out_features for site, is_open in zip(problem.sites, open_sites, strict=True)
            if is_open
        )  # fmt: skip
        if total is not None and total <= magnitudes:
            raise AllocationError(
                f"budget of {total:,} parameters is too small for dora: its magnitudes alone cost "
                f"{magnitudes:,}; raise the budget or narrow the placement."
            )
        inner = dataclasses.replace(problem, budget=None if total is None else total - magnitudes)
        found = method.solve(inner)
        if found.budget is None:
            return found
        total = found.budget + magnitudes if total is None else total
        used = [rank > 0 for rank in found.ranks]
        if used == open_sites:
            return dataclasses.replace(found, budget=total)
        if method.wrapped is not None:
            raise AllocationError(
                "a control arm with dora needs a rank of 1 or more at every site: which sites are "
                "left out decides what their magnitudes cost; required min_rank >= 1, got 0."
            )
        open_sites = used
        upper = tuple(
            high if rank > 0 else 0
            for high, rank in zip(problem.upper, found.ranks, strict=True)
        )  # fmt: skip
        problem = dataclasses.replace(problem, upper=upper)
