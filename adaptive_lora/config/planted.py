"""The planted teacher of a study, `--data planted:option=value,...`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.options import Limits, option, read_options

NAME = "planted"
SPECTRA = ("flat", "power_law", "noisy")
"""Singular values of a planted change of rank r: all equal; i^(-1/2) for i = 1 to r; or r equal values and a tail
of all others with a tenth of the energy."""


@dataclass(frozen=True, kw_only=True)
class PlantedTeacher:
    """The base with a low-rank change of known ranks, and the texts that it writes."""

    pattern: str = option("sparse", "sites that have the ranks, a pattern of the method `planted`")
    draw: int = option(0, "seed of the teacher's sites, singular vectors and texts", limits=Limits(low=0))
    min_rank: int = option(0, "planted rank of the sites outside the pattern", limits=Limits(low=0))
    budget: str = option("uniform-2", "parameters of the change as an adapter: a number or uniform-R")
    spectrum: str = option("flat", "singular values of the change", limits=Limits(choices=SPECTRA))
    distance: float = option(
        0.5, "KL(teacher || base) that the change is scaled to", unit="nats per token", limits=Limits(above=0)
    )
    length: int = option(16, "length of each text", unit="tokens", limits=Limits(low=2))
    texts: int = option(640, "texts of all parts together", limits=Limits(low=10))

    @classmethod
    def parse(cls, data: str) -> PlantedTeacher | None:
        """Return the teacher that a data source names; None for other sources.

        Raises:
            ConfigError: an unknown option, or a value out of limits; all problems at once.
        """
        if data != NAME and not data.startswith(f"{NAME}:"):
            return None
        teacher = read_options(cls, MethodSpec.split(data)[1])
        teacher.method()  # refuses an unknown pattern or budget
        return teacher

    def method(self) -> MethodSpec:
        """Return the method that plans the teacher's ranks: the oracle of its study."""
        given = {"pattern": self.pattern, "draw": self.draw, "budget": self.budget}
        return MethodSpec.build(NAME, {**given, "min_rank": None if self.min_rank == 1 else self.min_rank})

    @property
    def known_as(self) -> str:
        """Name of the teacher in its texts' identities, which had no `min_rank` when that was always 1."""
        return str(self).replace("min_rank=1,", "")

    def oracles(self) -> tuple[str, ...]:
        """Return the labels that the planted ranks have in a study of this teacher, now and before `min_rank`."""
        floors = (self.min_rank, 1)
        return tuple(dataclasses.replace(self, min_rank=floor).method().label for floor in floors)

    def __str__(self) -> str:
        """Return the data source with every option."""
        return f"{NAME}:" + ",".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
