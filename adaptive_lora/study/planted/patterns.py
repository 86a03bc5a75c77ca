"""Where the benchmark plants rank, and with which spectrum. Numbers only.

A pattern gives every site a weight; the ranks follow by apportionment under a parameter budget,
with at least rank 1 everywhere, so that the planted ranks are themselves an allocation of exactly
the budget that all methods are given: the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from adaptive_lora.allocation.budget import fit_to_budget
from adaptive_lora.allocation.site import ATTENTION_ROLES, AdapterSite
from adaptive_lora.results import FloatArray

Pattern = Callable[[Sequence[AdapterSite], np.random.Generator], list[float]]
Spectrum = Callable[[int, int], FloatArray]

LARGEST_SHARE = 0.25
"""No site is planted with more than this share of its largest possible rank."""


def flat(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return equal weights: the case in which uniform is right."""
    return [1.0] * len(sites)


def one_family(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on attention alone."""
    return [float(site.role in ATTENTION_ROLES) for site in sites]


def early(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the first third of the blocks."""
    return [float(place < 1 / 3) for place in _places(sites)]


def late(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the last third of the blocks."""
    return [float(place >= 2 / 3) for place in _places(sites)]


def sparse(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on a random quarter of the sites."""
    chosen = set(rng.permutation(len(sites))[: max(1, len(sites) // 4)].tolist())
    return [float(index in chosen) for index in range(len(sites))]


def scattered(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return exponentially distributed weights: every site needs another rank."""
    return [float(weight) for weight in rng.exponential(size=len(sites))]


def _places(sites: Sequence[AdapterSite]) -> list[float]:
    """Return where each site's block stands, in [0, 1)."""
    blocks = sorted({site.layer for site in sites})
    return [blocks.index(site.layer) / len(blocks) for site in sites]


PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {"flat": flat, "one_family": one_family, "early": early, "late": late, "sparse": sparse, "random": scattered}
)
"""Name -> weights of the sites, drawn from a stream of the benchmark's seed."""


def planted_ranks(pattern: str, sites: Sequence[AdapterSite], budget: int, rng: np.random.Generator) -> dict[str, int]:
    """Return the planted rank of every site; together they cost the budget, or just under it.

    Raises:
        AllocationError: the budget is too small for rank 1 everywhere, or too large for the cap.
    """
    ranks = fit_to_budget(
        PATTERNS[pattern](sites, rng),
        [site.parameters_per_rank for site in sites],
        [1] * len(sites),
        [max(1, int(LARGEST_SHARE * site.max_rank)) for site in sites],
        budget,
    )
    return {site.name: rank for site, rank in zip(sites, ranks, strict=True)}


def flat_spectrum(rank: int, full: int) -> FloatArray:
    """Return `rank` equal singular values."""
    return np.ones(rank)


def power_law(rank: int, full: int) -> FloatArray:
    """Return `rank` singular values i^(-1/2): the first ranks are worth more than the last."""
    values: FloatArray = np.arange(1, rank + 1, dtype=np.float64) ** -0.5
    return values


def noisy(rank: int, full: int) -> FloatArray:
    """Return `rank` equal values and a tail of all others with a tenth of the energy."""
    tail = max(full - rank, 1)
    return np.concatenate([np.ones(rank), np.full(full - rank, np.sqrt(0.1 * rank / tail))])


SPECTRA: Mapping[str, Spectrum] = MappingProxyType({"flat": flat_spectrum, "power_law": power_law, "noisy": noisy})
"""Name -> singular values from the planted rank and the largest possible one, before scaling."""


def planted_energy(spectrum: str, rank: int, full: int) -> FloatArray:
    """Return the squared singular values of a site, scaled so that they add up to its rank."""
    squares = SPECTRA[spectrum](rank, full) ** 2
    scaled: FloatArray = squares * (rank / squares.sum())
    return scaled
