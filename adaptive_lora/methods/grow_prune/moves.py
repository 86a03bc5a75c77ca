"""Moving ranks between sites within a budget: which components go, which sites grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WORTH_MOVING = 2.0
"""A receiver's weakest component must matter this many times as much as what is given up for it;
below that a move is as likely noise as gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteView:
    """One site when ranks are decided."""

    scores: tuple[float | None, ...]
    """Sensitivity per component; None: too young to be judged."""
    cost: int
    """Parameters per rank."""
    max_rank: int

    @property
    def weakest(self) -> float | None:
        """Least score, or None while a component is too young: the site waits for its verdict."""
        judged = [score for score in self.scores if score is not None]
        return min(judged) if len(judged) == len(self.scores) else None


@dataclass(kw_only=True, slots=True)
class Change:
    """What happens to one site."""

    pruned: list[int] = field(default_factory=list)
    """Components that go."""
    grown: int = 0
    """New components."""


def decide_moves(sites: Sequence[SiteView], *, slack: int, limit: int, fill: bool = False) -> list[Change]:
    """Move ranks from where the weakest components matter least to where they matter most.

    A site whose weakest component matters more than those of others could use another: L1RA's rule
    (2509.04884), with AdaLoRA's sensitivity in the place of its gates. Where no move is worth it,
    the weakest components of all sites matter about the same, which is the condition of the
    optimum if a component's score falls with its index.

    Args:
        sites: as they stand.
        slack: parameters of the budget that are not in use.
        limit: most new components.
        fill: afterwards also use up the slack, wherever another rank fits.

    Returns:
        One change per site; every site keeps a component, and the cost of what grows is at most
        that of what goes plus the slack.
    """
    changes = [Change() for _ in sites]
    receivers = sorted(_receivers(sites), key=lambda index: -(sites[index].weakest or 0.0))
    for index in receivers[:limit]:
        if changes[index].pruned:
            continue  # it has given something up; its turn would come after what it gave
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
    """Return the weakest components that free so many parameters, or None where not worth it."""
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
