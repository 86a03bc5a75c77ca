"""Seeds that are added until comparisons are decided: the plan of the looks, and what each look found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from adaptive_lora.analysis.comparison.findings import VerdictKind
from adaptive_lora.analysis.comparison.outcome import Margin
from adaptive_lora.analysis.stats import Interval, Looks


def first_looks(counts: tuple[int, ...], comparisons: int, alpha: float = 0.05) -> tuple[int | None, int | None]:
    """Return the seeds of the first look that can show a difference, and of the first that can show equivalence.

    None: no look can, whatever the differences are.

    Args:
        counts: number of seeds at each look; at the last one all of alpha is spent.
        comparisons: number of comparisons that Holm corrects a difference for; equivalence is not corrected.
        alpha: error over all looks.
    """
    plans = [Looks(most=counts[-1], planned=counts[:end], seeds=counts[:end]) for end in range(1, len(counts) + 1)]
    least = {plan.seeds[-1]: plan.attainable_p for plan in plans}
    difference = next((count for count, p in least.items() if comparisons * p <= alpha), None)
    return difference, next((count for count, p in least.items() if p / 2 <= alpha), None)  # one-sided


@dataclass(frozen=True, kw_only=True, slots=True)
class LookedAt:
    """A method at one look."""

    method: str
    seeds: int
    """Number of paired seeds so far."""
    mean: float
    """Mean difference to the baseline, in the unit of the outcome."""
    interval: Interval
    """Interval that holds over all looks together."""
    p: float
    """Corrected p over all looks so far."""
    verdict: VerdictKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One look: what was known of the methods that were not decided before."""

    seeds: tuple[int, ...]
    """Seeds that it added."""
    methods: tuple[LookedAt, ...]

    def decided(self, method: str) -> bool:
        """Tell whether the look decided a method's comparison, so that it gets no more seeds."""
        return any(one.method == method and one.verdict is not VerdictKind.INCONCLUSIVE for one in self.methods)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedPlan:
    """Seeds of a study that goes on until its comparisons are decided."""

    most: int
    """Number of seeds at which the last look takes place."""
    added: tuple[tuple[int, ...], ...]
    """Seeds that each look so far added, in order."""

    margin: Margin | None = None
    """Margin as the first look computed it, where it is a share of what the baseline gains; None before that look."""
    earlier: tuple[Look, ...] = ()
    """Results of the looks so far that are over."""

    @classmethod
    def from_dict(cls, values: Any) -> SeedPlan:
        """Return the plan that was recorded as JSON.

        Raises:
            KeyError, TypeError, ValueError: it is no such record.
        """
        looks = tuple(
            Look(
                seeds=tuple(look["seeds"]),
                methods=tuple(
                    LookedAt(**{**one, "interval": Interval(**one["interval"]), "verdict": VerdictKind(one["verdict"])})
                    for one in look["methods"]
                ),
            )
            for look in values["looks"]
        )
        return cls(
            most=values["most"],
            added=tuple(map(tuple, values["added"])),
            margin=Margin(**values["margin"]),
            earlier=looks,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as `from_dict` reads it."""
        values = asdict(self)
        return {**values, "looks": values.pop("earlier")}

    def expected(self, method: str) -> tuple[int, ...]:
        """Return the seeds that a method was trained with: all so far, or those up to the look that decided it."""
        decided = (place for place, look in enumerate(self.earlier, 1) if look.decided(method))
        return tuple(seed for look in self.added[: next(decided, None)] for seed in look)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of seeds at each look so far."""
        return tuple(accumulate(map(len, self.added)))

    def in_order(self, differences: Mapping[int, float]) -> tuple[list[float], Looks]:
        """Return the differences of one method in the order of the looks, with the looks that it took part in.

        Args:
            differences: seed -> difference, of at least one seed of the plan. A method that was decided at a look
                has none of later ones.
        """
        found = [[differences[seed] for seed in look if seed in differences] for look in self.added]
        have = [look for look, values in enumerate(found) if values]
        part = slice(have[0], have[-1] + 1)
        return [value for values in found[part] for value in values], Looks(
            most=self.most, planned=self.counts[part], seeds=tuple(accumulate(map(len, found[part])))
        )
