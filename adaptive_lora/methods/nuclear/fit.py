"""Trainings under a nuclear-norm penalty, the ranks that they leave, and the choice among these."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.allocate import rank_limits
from adaptive_lora.allocation.plan import rank_budget
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.methods.adapters import audit_moved
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.candidates import attach_best, search_problem, train_ranks
from adaptive_lora.methods.adapters.factors import read_factors, spectrum
from adaptive_lora.methods.base import RankEvent, TrainedTrial, TrainerCallback, TrialContext
from adaptive_lora.methods.importance import ImportanceProfile
from adaptive_lora.methods.nuclear import NuclearRetrain

_SMOOTHING = 0.2
"""Nuclear norm added to that of each site in the next round's prices, as a share of the mean over sites."""


class NuclearPenalty(TrainerCallback):
    """Penalty on A and B: the sum over sites of p · s · (||A||² + ||B||²) / 2, with LoRA's factor s.

    Its minimum over all factors of an update ΔW = s·B·A is p · ||ΔW||*.
    """

    def __init__(self, adapted: object, prices: Mapping[str, float]) -> None:
        """Prepare the penalty of a model with LoRA adapters.

        Args:
            adapted: model with adapters.
            prices: site name -> price p, in nats per token and unit of the nuclear norm.
        """
        self._terms = [
            (prices[name] * layer.scaling[ADAPTER] / 2, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
            for name, layer in lora_layers(adapted).items()
        ]

    def penalty(self) -> torch.Tensor:
        """Return the penalty of the weights as they are."""
        return torch.stack(
            [price * (a.weight.square().sum() + b.weight.square().sum()) for price, a, b in self._terms]
        ).sum()


def fit_nuclear_retrain(options: NuclearRetrain, trial: TrialContext) -> TrainedTrial:
    """Train uniform ranks and those of every round, and keep the best on validation data."""
    start, total = options.start_plan(trial.plan), options.trainings
    problem, budget, profile = search_problem(trial), rank_budget(trial.plan), trial.profile("gradient_norm")
    sites, limits = problem.sites, rank_limits(trial.method, problem.sites, least=0)
    strength = options.penalty * _median_gradient(profile, sites)
    prices = reweighted_prices(sites, strength)
    candidates, seconds = [train_ranks(trial, problem.uniform(budget), trainings=total)], profile.seconds
    for _ in range(options.rounds):
        values, spent = _search(trial, start, prices, trainings=total)
        ranks = limits.by_value([values[site.name] for site in sites], problem.costs, budget, one_threshold=False)
        candidates.append(train_ranks(trial, ranks, trainings=total))
        prices = reweighted_prices(sites, strength, {name: sum(found) for name, found in values.items()})
        seconds += spent
    adapted, number = attach_best(trial, candidates)  # uniform, the first, where none is better
    best = candidates[number]
    before = {site.name: entry.rank for site, entry in zip(sites, start.entries, strict=True)}
    after = dict.fromkeys(before, 0) | best.plan.rank_pattern()
    changed = RankEvent(step=(total - 1) * len(best.result.losses), ranks=after)
    return TrainedTrial(
        model=adapted,
        plan=best.plan,
        result=best.result,
        training_parameters=start.trainable_parameters,
        history=(RankEvent(step=0, ranks=before), changed),
        search_seconds=seconds + sum(each.result.seconds for each in candidates) - best.result.seconds,
        extra={
            "nuclear/round": float(number),
            "nuclear/gain_on_validation": candidates[0].result.validation_loss - best.result.validation_loss,
        },
    )


def reweighted_prices(
    sites: Sequence[AdapterSite], strength: float, norms: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return site name -> price of its nuclear norm: in proportion to parameters per rank, and to 1 / (norm + ε).

    Args:
        sites: sites to price.
        strength: mean price without norms, in nats per token and unit of the nuclear norm.
        norms: nuclear norms of the updates of the round before; None in the first round, or if all are zero.
    """
    mean_cost = statistics.fmean(site.parameters_per_rank for site in sites)
    prices = {site.name: strength * site.parameters_per_rank / mean_cost for site in sites}
    mean = statistics.fmean(norms.values()) if norms else 0.0
    if not norms or mean == 0:
        return prices
    return {name: price * mean / (norms[name] + _SMOOTHING * mean) for name, price in prices.items()}


def _median_gradient(profile: ImportanceProfile, sites: Sequence[AdapterSite]) -> float:
    """Return the median over sites of the largest singular value of the base's mean gradient, by `gradient_norm`.

    A penalty above the largest of these values leaves no update at all, whatever the base and the unit of its weights.
    """
    assert profile.spectra is not None
    return statistics.median(math.sqrt(profile.spectra[site.name][0]) for site in sites)


def _search(
    trial: TrialContext, start: RankPlan, prices: Mapping[str, float], *, trainings: int
) -> tuple[dict[str, list[float]], float]:
    """Train above the budget under the penalty; return the singular values of every update, and the seconds."""
    adapted = trial.attach(start)
    result = trial.train(adapted, NuclearPenalty(adapted, prices), trainings=trainings)
    audit_moved(adapted)
    scales = {entry.site.name: start.scale_of(entry) for entry in start.entries}
    values = {name: spectrum(site, scales[name]).values.tolist() for name, site in read_factors(adapted).items()}
    trial.release()
    return values, result.seconds
