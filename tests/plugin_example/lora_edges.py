"""A method and a profiler for adaptive-lora, from a package of their own."""

from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation import RankRequest, uniform_cost
from adaptive_lora.methods.importance.weights import WeightProfiler
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class Edges:
    """More rank in the first and last layers; the budget is that of uniform at `rank`."""

    metric: ClassVar[str | None] = None
    rank: int = option(8, "its budget is that of uniform at this rank", limits=Limits(low=1))
    edge: float = option(3.0, "how much more the outer layers get", limits=Limits(above=0))

    @property
    def rank_label(self) -> str:
        """Return what tells its options apart in tables."""
        return f"r{self.rank}-edge{self.edge:g}"

    def demand(self, sites, evidence):
        """Return wanted ranks, as proportions under the budget."""
        outer = (min(site.layer for site in sites), max(site.layer for site in sites))
        ranks = tuple(self.edge if site.layer in outer else 1.0 for site in sites)
        return RankRequest(ranks=ranks, budget=uniform_cost(sites, self.rank))


frobenius = WeightProfiler(score=lambda eigenvalues: float(eigenvalues.sum().sqrt()))
