"""Grow and prune: ranks move between sites during training, never above the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.plan import budget_of, revised
from adaptive_lora.methods.adapters.attach import ADAPTER, initial_a, lora_layers
from adaptive_lora.methods.adapters.audit import audit_moved
from adaptive_lora.methods.adapters.factors import read_factors, write_factors
from adaptive_lora.methods.base import RankEvent, TrainedTrial, TrialContext
from adaptive_lora.methods.grow_prune import GrowPrune
from adaptive_lora.methods.grow_prune.resize import NewRank, resize
from adaptive_lora.methods.ranks_in_training import RankChanges

_SMOOTHING = 0.85
"""Smoothing factor of the sensitivity's running mean (AdaLoRA's beta_1)."""
_YOUNG = 5
"""Minimum age of a component, in steps, before it can be pruned, for any interval."""


def fit_grow_prune(options: GrowPrune, trial: TrialContext) -> TrainedTrial:
    """Train plain LoRA from equal ranks, moving ranks between sites."""
    adapted = trial.attach(trial.plan)
    callback = GrowPruneCallback(adapted, trial.plan, options, seed=trial.seed)
    result = trial.train(adapted, callback)
    audit_moved(adapted)
    plan, factors = revised(trial.plan, callback.ranks()), read_factors(adapted)
    trial.release()
    # PEFT's configuration still has the starting ranks.
    plain = trial.attach(plan, head_as_trained=True)
    write_factors(plain, factors)
    return TrainedTrial(
        model=plain,
        plan=plan,
        result=result,
        training_parameters=callback.most_parameters(),
        history=tuple(callback.history),
    )


class GrowPruneCallback(RankChanges):
    """Keeps a running sensitivity per component, and moves ranks when due."""

    def __init__(self, adapted: PeftModel, plan: RankPlan, options: GrowPrune, *, seed: int) -> None:
        """Prepare for a model that was just attached.

        Args:
            adapted: model with plain LoRA adapters.
            plan: plan of the model; the budget holds at every step.
            options: options of the method.
            seed: seed of the rows of A of new components.
        """
        self._layers, self._plan, self._seed = lora_layers(adapted), plan, seed
        self._options, self._budget = options, budget_of(plan)
        ranks = plan.rank_pattern()
        device = adapted.device
        self._smooth = {name: torch.zeros(rank, device=device) for name, rank in ranks.items()}
        self._age = {name: [0] * rank for name, rank in ranks.items()}
        self._drawn = dict(ranks)
        self.optimizer: torch.optim.Optimizer | None = None
        """Optimiser of A and B, once there is one."""
        self.history = [RankEvent(step=0, ranks=dict(ranks))]

    def ranks(self) -> dict[str, int]:
        """Return site name -> current rank."""
        return {name: len(ages) for name, ages in self._age.items()}

    def most_parameters(self) -> int:
        """Return the maximum number of parameters trained at the same time."""
        return max(revised(self._plan, e.ranks).trainable_parameters for e in self.history)

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Compute the phases from the number of steps."""
        self.optimizer, self.phases = optimizer, self._options.phases(steps)

    def stepped(self, step: int, *, taken: bool) -> None:
        """Update sensitivities, and move ranks if due."""
        if step > self.phases.settle:
            return
        if taken:
            self._measure()
        if self.phases.due(step):
            self._move(step)

    def state(self) -> dict[str, Any]:
        """Return sensitivities, ages, rows drawn and the history."""
        return {"smooth": self._smooth, "age": self._age, "drawn": self._drawn, **super().state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give every layer the rank in `state`; weights and moments are loaded afterwards."""
        for name, ages in state["age"].items():
            if len(ages) != len(self._age[name]):
                width = self._layers[name].in_features
                self._resize(name, [], torch.zeros(len(ages), width))
        self._smooth, self._age = state["smooth"], state["age"]
        self._drawn = state["drawn"]
        super().restore(state)

    @torch.no_grad()
    def _measure(self) -> None:
        """Update the running mean of |w·g|, averaged over a row of A plus a column of B."""
        for name, layer in self._layers.items():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            now = (a * a.grad).abs().mean(dim=1) + (b * b.grad).abs().mean(dim=0)
            self._smooth[name] = _SMOOTHING * self._smooth[name].to(now.device) + (1 - _SMOOTHING) * now
            self._age[name] = [age + 1 for age in self._age[name]]

    def _move(self, step: int) -> None:
        names, ranks = list(self._age), self.ranks()
        spent = revised(self._plan, ranks).trainable_parameters
        changes = decide_moves(
            [self._view(name) for name in names],
            slack=self._budget - spent,
            limit=max(1, round(self._options.move_share * sum(ranks.values()))),
            fill=step == self.phases.settle,
        )
        for name, change in zip(names, changes, strict=True):
            if change.pruned or change.grown:
                self._apply(name, change)
        if self.ranks() != ranks:
            self.record(step)

    def _view(self, name: str) -> SiteView:
        """Return a site with its scores; the running mean is bias-corrected for its start at zero."""
        grown_up = max(_YOUNG, 2 * self.phases.interval)
        scores = [
            mean / (1 - _SMOOTHING**age) if age >= min(grown_up, self.phases.settle - 1) else None
            for mean, age in zip(self._smooth[name].tolist(), self._age[name], strict=True)
        ]
        site = next(e.site for e in self._plan.entries if e.site.name == name)
        return SiteView(scores=tuple(scores), cost=site.parameters_per_rank, max_rank=site.max_rank)

    def _apply(self, name: str, change: Change) -> None:
        kept = [index for index in range(len(self._age[name])) if index not in change.pruned]
        drawn, width = self._drawn[name], self._layers[name].in_features
        rows = initial_a(self._seed, name, drawn + change.grown, width)[drawn:]
        self._drawn[name] = drawn + change.grown
        self._resize(name, kept, rows)
        self._age[name] = [self._age[name][index] for index in kept] + [0] * change.grown
        old = self._smooth[name]
        self._smooth[name] = torch.cat([old[kept], old.new_zeros(change.grown)])

    def _resize(self, name: str, kept: list[int], rows: torch.Tensor) -> None:
        rank = len(kept) + len(rows)
        plan = revised(self._plan, {**self.ranks(), name: rank})
        entry = next(entry for entry in plan.entries if entry.site.name == name)
        change = NewRank(kept=kept, new_a=rows, alpha=entry.alpha, scale=self._plan.scale_of(entry))
        resize(self._layers[name], change, self.optimizer)


# Moves of ranks between sites within a budget: components to prune, and sites to grow.

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
    receivers = [i for i, site in enumerate(sites) if site.weakest is not None and len(site.scores) < site.max_rank]
    receivers.sort(key=lambda index: -(sites[index].weakest or 0.0))
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
