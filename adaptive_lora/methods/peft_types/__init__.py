"""Every type of adapter of PEFT that has a part at each site, at a budget."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.plan import RankPlan
from adaptive_lora.allocation.spec import LIMITS
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.base import RankMethod, TunerMethod
from adaptive_lora.methods.peft_types.table import REFUSED, TYPES
from adaptive_lora.options import Limits, option

_NAMED: Collection[str] = ChainMap(REFUSED, TYPES)  # type: ignore[arg-type]  # nothing is written
"""Names of types that are taken, those of packages that are installed later too, then of those that are refused."""


@dataclass(frozen=True, kw_only=True)
class PeftTypeMethod(TunerMethod):
    """Any type of adapter of PEFT that has a part at each site, by its own configuration.

    Its size is found by building it without weights and counting. Options that are not listed here are those of the
    type's configuration class in PEFT, such as `gralora_k` of GRALORA. With `of`, a method that allocates ranks says
    how many parameters each site gets; types with a size per site spend them.
    """

    name: ClassVar[str] = "peft"
    takes: ClassVar[frozenset[str] | None] = frozenset(
        {"budget", "placement", "target_names", "roles", "layers", "towers", *LIMITS, "profiled_on", "base"}
    )
    wraps: ClassVar[bool] = True
    further: ClassVar[str | None] = "configuration"
    type: str = option("HIRA", "type of adapter, as in PEFT's PeftType", limits=Limits(choices=_NAMED))
    of: RankMethod | None = option(  # noqa: RUF009
        None, "method that allocates parameters to sites, for types with a size per site; none: one size at all sites"
    )
    configuration: tuple[tuple[str, str], ...] = option(
        (), "options of the type's configuration in PEFT, by their names"
    )

    def __post_init__(self) -> None:
        """Refuse types that are no part of a site, and allocation where a type has one size.

        Raises:
            ConfigError: the type cannot be trained this way; the message has the reason.
        """
        if self.type in REFUSED:
            raise ConfigError(f"peft: type={self.type}: {REFUSED[self.type]}; required one of {', '.join(TYPES)}.")
        facts = TYPES[self.type]
        if self.of is not None and not facts.pattern:
            able = ", ".join(name for name, one in TYPES.items() if one.pattern)
            raise ConfigError(
                f"peft: type={self.type} has one size at all sites, so that of={self.of.name} cannot allocate it; "
                f"leave of out, or take a type with a size per site: {able}."
            )
        if self.of is not None and facts.size in dict(self.configuration):
            raise ConfigError(f"peft: {facts.size} is set per site by of={self.of.name}; leave it out.")

    @property
    def wrapped(self) -> RankMethod | None:
        """Method that allocates parameters to sites."""
        return self.of

    @property
    def further_packages(self) -> tuple[str | None, ...]:
        """Package that offers a type that PEFT does not have."""
        return (TYPES.package(self.type),)

    @property
    def needs_full_base(self) -> str:
        """Reason why a type does not train over a base in 4 bit; empty: it does."""
        if TYPES[self.type].packed:
            return ""
        able = ", ".join(name for name, facts in TYPES.items() if facts.packed)
        return f"PEFT does not train type={self.type} over a base in 4 bit; required one of {able}"

    @property
    def metric(self) -> str | None:
        """Importance profile that the allocating method needs."""
        return None if self.of is None else self.of.metric

    def label_under(self, budget: str | None) -> str:
        """Return `HIRA`, the short form of the allocating method, and the options of the configuration."""
        given = "-".join(f"{name}{value}" for name, value in self.configuration)
        return "-".join(filter(None, [self.type, None if self.of is None else self.of.rank_label, given]))

    def plan(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the plan with one size at all sites; its parameters may be a little above the budget, too.

        Raises:
            AllocationError: the type does not fit the base, or no size meets the budget.
        """
        return self.design(base, budget, method)

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the plan with one size at all sites of a base."""
        from adaptive_lora.methods.peft_types.sizes import one_size

        return one_size(self, base, budget, method)

    def design_shares(self, base: Architecture, ranks: RankPlan, method: str) -> TunerPlan:
        """Return the plan in which every site has about as many parameters as a rank plan gives it.

        Raises:
            AllocationError: the type does not fit the base, or no sizes meet the budget.
        """
        from adaptive_lora.methods.peft_types.sizes import size_per_site

        return size_per_site(self, base, ranks, method)
