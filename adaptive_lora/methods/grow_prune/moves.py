"""Moves of ranks between sites within a budget: components to prune, and sites to grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WORTH_MOVING = 2.0
"""Minimum ratio of a receiver's lowest score to the scores given up for it; below it, a move is as likely
noise as gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteView:
    """One site at the time of a decision."""

    scores: tuple[float | None, ...]
    """Sensitivity per component; None: too young to be compared."""
    cost: int
    """Number of parameters per rank."""
    max_rank: int

    @property
    def weakest(self) -> float | None:
        """Lowest score, or None while a component is too young; the site is then not changed."""
        judged = [score for score in self.scores if score is not None]
        return min(judged) if len(judged) == len(self.scores) else None


@dataclass(kw_only=True, slots=True)
class Change:
    """Change of one site's components."""

    pruned: list[int] = field(default_factory=list)
    """Indices of the components to prune."""
    grown: int = 0
    """Number of new components."""


def decide_moves(sites: Sequence[SiteView], *, slack: int, limit: int, fill: bool = False) -> list[Change]:
    """Move ranks from the sites with the lowest minimum score to those with the highest.

    A site whose weakest component scores higher than those of others can use another one: L1RA's rule
    (2509.04884), with AdaLoRA's sensitivity instead of its gates. Where no move is worthwhile, the
    weakest components of all sites score about the same, which is the condition of the optimum if
    scores fall with a component's index.

    Args:
        sites: sites with their current components.
        slack: number of parameters of the budget that are not in use.
        limit: maximum number of new components.
        fill: whether to use up the slack afterwards, wherever another rank fits.

    Returns:
        One change per site; every site keeps at least one component, and new components cost at most
        as much as the pruned ones plus the slack.
    """
    changes = [Change() for _ in sites]
    receivers = sorted(_receivers(sites), key=lambda index: -(sites[index].weakest or 0.0))
    for index in receivers[:limit]:
        if changes[index].pruned:
            continue  # it was pruned; its next component would score below the pruned one
        given = _give_up(sites, changes, index, sites[index].cost - slack)
        if given is None:
            continue
        for site, component in given:
            changes[site].pruned.append(component)
            slack += sites[site].cost
        changes[index].grown += 1
        slack -= sites[index].cost
    if fill:
        _fill(sites, changes, slack)
    return changes


def _receivers(sites: Sequence[SiteView]) -> Iterator[int]:
    for index, site in enumerate(sites):
        if site.weakest is not None and len(site.scores) < site.max_rank:
            yield index


def _give_up(
    sites: Sequence[SiteView], changes: Sequence[Change], receiver: int, needed: int
) -> list[tuple[int, int]] | None:
    """Return the weakest components that free enough parameters, or None if the move is not worthwhile."""
    worth = (sites[receiver].weakest or 0.0) / WORTH_MOVING
    candidates = sorted(
        (score, site, component)
        for site, view in enumerate(sites)
        if site != receiver and not changes[site].grown
        for component, score in enumerate(view.scores)
        if score is not None and score < worth and component not in changes[site].pruned
    )
    left = [len(view.scores) - len(change.pruned) for view, change in zip(sites, changes, strict=True)]
    given: list[tuple[int, int]] = []
    for _, site, component in candidates:
        if needed <= 0:
            break
        if left[site] > 1:
            given.append((site, component))
            left[site] -= 1
            needed -= sites[site].cost
    return given if needed <= 0 else None


def _fill(sites: Sequence[SiteView], changes: Sequence[Change], slack: int) -> None:
    order = sorted(range(len(sites)), key=lambda index: (bool(changes[index].pruned), -(sites[index].weakest or 0.0)))
    grew = True
    while grew:
        grew = False
        for index in order:
            site, change = sites[index], changes[index]
            rank = len(site.scores) - len(change.pruned) + change.grown
            if site.cost <= slack and rank < site.max_rank:
                change.grown += 1
                slack -= site.cost
                grew = True
