"""AdaLoRA: PEFT's layers and allocator, called before gradients are cleared, then folded into plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from transformers import PreTrainedModel

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.plan import budget_of, revised
from adaptive_lora.errors import AdapterError, TrialFailed
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adapters.attach import (
    ADAPTER,
    in_head,
    lora_layers,
    peft_model,
    peft_task,
    stores_transposed,
)
from adaptive_lora.methods.adapters.audit import audit_moved, head_problems, trained_tensors
from adaptive_lora.methods.adapters.dropout import SiteDropout
from adaptive_lora.methods.adapters.factors import Factors, write_factors
from adaptive_lora.methods.base import RankEvent, TrainedTrial, TrialContext
from adaptive_lora.methods.ranks_in_training import RankChanges
from adaptive_lora.seeding import rng_for

_SPREAD = 0.02
"""Standard deviation of the initial P and Q, as in PEFT."""


def fit_adalora(options: AdaLora, trial: TrialContext) -> TrainedTrial:
    """Train AdaLoRA layers, then fold their updates into a plain LoRA adapter of mixed ranks."""
    start = options.start_plan(trial.plan)
    adapted = trial.adopt(
        attach_adalora(trial.base, start, options, seed=trial.seed, dropout=trial.dropout, head=trial.head)
    )
    audit_adalora(adapted, start, trial.head)
    callback = AdaLoraCallback(adapted, start, options, budget_of(trial.plan))
    result = trial.train(adapted, callback)
    plan = revised(start, callback.ranks())
    factors = fold(adapted, callback.kept, plan)
    trial.release()
    plain = trial.attach(plan, head_as_trained=True)
    write_factors(plain, factors)
    audit_moved(plain)
    return TrainedTrial(
        model=plain,
        plan=plan,
        result=result,
        training_parameters=training_parameters(start),
        history=tuple(callback.history),
    )


def attach_adalora(
    model: PreTrainedModel, start: RankPlan, options: AdaLora, *, seed: int, dropout: float, head: Sequence[str] = ()
) -> PeftModel:
    """Attach AdaLoRA layers of one rank; E starts at zero, so the model initially computes the base's function.

    `audit_adalora` then compares what was built.

    Args:
        model: the frozen base.
        start: starting plan, with the same rank at every site.
        options: options of the method.
        seed: seed of P, Q and the dropout masks.
        dropout: probability of dropping an input.
        head: modules trained in addition to the adapters.
    """
    (rank,) = {entry.rank for entry in start.entries}
    names = [entry.site.name for entry in start.entries]
    config = AdaLoraConfig(
        task_type=peft_task(model),
        modules_to_save=list(head) or None,
        init_r=rank,
        target_r=1,  # the final number of ranks is set on the allocator
        total_step=1,  # the schedule follows when training starts
        orth_reg_weight=options.orthogonality,
        lora_alpha=start.scale_of(start.entries[0]) * rank,  # type: ignore[arg-type]
        target_modules=names,
        lora_dropout=dropout,
        fan_in_fan_out=stores_transposed(model, names),
    )
    adapted = peft_model(model, config, start.method)
    for name, layer in lora_layers(adapted).items():
        # On a bf16 base peft 0.21 rounds ranknum to bf16 and lets it be trained.
        layer.ranknum[ADAPTER].requires_grad_(False).fill_(float(rank))
        with torch.no_grad():
            layer.lora_A[ADAPTER].copy_(_initial(seed, "adalora_Q", name, rank, layer.in_features))
            layer.lora_B[ADAPTER].copy_(_initial(seed, "adalora_P", name, rank, layer.out_features).T)
        if dropout > 0:
            layer.lora_dropout[ADAPTER] = SiteDropout(dropout, seed=seed, site=name)
    return adapted


def _initial(seed: int, part: str, site: str, rank: int, width: int) -> torch.Tensor:
    """Return a matrix (rank, width) from the site's stream; a smaller rank is a prefix of a larger one."""
    values = rng_for(seed, part, site).standard_normal((rank, width), dtype="float32")
    return torch.from_numpy(values * _SPREAD)


def training_parameters(start: RankPlan) -> int:
    """Return the number of parameters that AdaLoRA trains: P, Q and E of every starting triplet."""
    return start.trainable_parameters + sum(entry.rank for entry in start.entries)


def audit_adalora(adapted: PeftModel, start: RankPlan, head: Sequence[str] = ()) -> None:
    """Compare sites, scales and the number of trainable parameters with the starting plan.

    Raises:
        AdapterError: there are differences; the message lists all of them.
    """
    built = {name: scale_of(layer) for name, layer in lora_layers(adapted).items()}
    planned = {entry.site.name: start.scale_of(entry) for entry in start.entries}
    problems = [f"{name} differs in adaptation" for name in built.keys() ^ planned.keys()]
    problems += [
        f"{name}: scale is {built[name]}, planned {scale}"
        for name, scale in planned.items()
        if name in built and not math.isclose(built[name], scale, rel_tol=1e-4)
    ]
    problems += head_problems(adapted, head)
    total = sum(p.numel() for name, p in trained_tensors(adapted).items() if not in_head(name, head))
    if total != training_parameters(start):
        problems.append(f"{total:,} parameters trainable, planned {training_parameters(start):,}")
    if problems:
        raise AdapterError("AdaLoRA differs from its plan: " + "; ".join(sorted(problems)))


def scale_of(layer: Any) -> float:
    """Return the factor of a layer's update; PEFT adds 1e-5 to the starting rank."""
    return float(layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].detach() + 1e-5))


def fold(adapted: PeftModel, kept: Mapping[str, list[bool]], plan: RankPlan) -> dict[str, Factors]:
    """Return plain LoRA factors with the same update: B = P, A = E·Q times the ratio of scales.

    Args:
        adapted: trained AdaLoRA model.
        kept: site name -> per triplet, whether it remains.
        plan: final ranks and scales.
    """
    layers, folded = lora_layers(adapted), {}
    for entry in plan.entries:
        name = entry.site.name
        layer, chosen = layers[name], torch.tensor(kept[name], device=adapted.device)
        a, b, e = (part[ADAPTER].detach().float() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
        rest = scale_of(layer) / plan.scale_of(entry)
        folded[name] = Factors(a=a[chosen] * e[chosen] * rest, b=b[:, chosen].clone())
    return folded


class AdaLoraCallback(RankChanges):
    """Calls `update_and_allocate` after each optimiser step, before gradients are cleared.

    The state has what PEFT does not save: sensitivities and the mask over un-resized tensors. A run
    resumed through PEFT's own checkpoint counts the pruned ranks twice.
    """

    def __init__(self, adapted: PeftModel, start: RankPlan, options: AdaLora, budget: int) -> None:
        """Prepare for a model that was just attached.

        Args:
            adapted: model with AdaLoRA layers.
            start: starting plan of the model.
            options: options of the method.
            budget: maximum number of parameters of the folded adapter.
        """
        self.kept = {entry.site.name: [True] * entry.rank for entry in start.entries}
        self.history = [RankEvent(step=0, ranks=self.ranks())]
        self._tuner: Any = adapted.base_model
        self._layers = lora_layers(adapted)
        self._options, self._budget = options, budget
        self._costs = {e.site.name: e.site.parameters_per_rank for e in start.entries}

    def ranks(self) -> dict[str, int]:
        """Return site name -> number of remaining triplets."""
        return {name: sum(mask) for name, mask in self.kept.items()}

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Compute the phases from the number of steps, and set PEFT's schedule by them."""
        phases = self.phases = self._options.phases(steps)
        config = self._config
        config.tinit, config.tfinal = phases.warmup, phases.steps - phases.settle
        config.deltaT, config.total_step = phases.interval, phases.steps

    def penalty(self) -> torch.Tensor | None:
        """Return the weighted mean of ‖QQᵀ - I‖ and ‖PᵀP - I‖ (section 3.1, as in PEFT)."""
        weight = self._options.orthogonality
        if not weight:
            return None
        products = [
            product
            for layer in self._layers.values()
            for a, b in [(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])]
            for product in (a @ a.T, b.T @ b)
        ]
        terms = [
            torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)) for product in products
        ]
        return weight * torch.stack(terms).mean()

    def stepped(self, step: int, *, taken: bool) -> None:
        """Update sensitivities; if due, prune to the schedule's number of ranks."""
        settle, allocator = self.phases.settle, self._allocator
        if step < settle and not taken:
            return  # no gradient to learn from
        if step == settle and not allocator.exp_avg_ipt:
            raise TrialFailed(
                f"AdaLoRA must decide ranks at step {settle}, but every step so far was skipped as "
                "not finite. Lower the learning rate or use precision bf16 or fp32."
            )
        if self.phases.due(step) and allocator.exp_avg_ipt:
            allocator.target_bgt = self._affordable_ranks()
        self._tuner.update_and_allocate(step)
        if self.phases.due(step) and self._config.rank_pattern:
            self.kept = self._by_site(self._config.rank_pattern)
            self.record(step)

    def state(self) -> dict[str, Any]:
        """Return sensitivities, mask and target."""
        allocator = self._allocator
        return {
            "sensitivity": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
            "target": allocator.target_bgt,
            "rank_pattern": self._config.rank_pattern,
            "kept": self.kept,
            **super().state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore them in PEFT's allocator."""
        allocator = self._allocator
        device = self._tuner.model.device
        allocator.exp_avg_ipt, allocator.exp_avg_unc = (
            {name: scores.to(device) for name, scores in state[kind].items()} for kind in ("sensitivity", "uncertainty")
        )
        allocator.ipt = dict.fromkeys(state["sensitivity"])  # the known parameters; recomputed at each step
        allocator.target_bgt = state["target"]
        self._config.rank_pattern = state["rank_pattern"]
        self.kept = state["kept"]
        super().restore(state)

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[ADAPTER]

    @property
    def _allocator(self) -> Any:
        return self._tuner.rankallocator

    def _affordable_ranks(self) -> int:
        """Return how many of the best triplets fit into the parameter budget.

        PEFT's own pruning is tried by bisection and E restored, so that PEFT's order decides. At the
        last pruning sensitivities are no longer updated, so the result is exact there.
        """
        before = {name: layer.lora_E[ADAPTER].detach().clone() for name, layer in self._layers.items()}
        low, high = 0, self._allocator.init_bgt - 1
        while low < high:
            middle = (low + high + 1) // 2
            masks = self._by_site(self._allocator.mask_to_budget(self._tuner.model, middle))
            cost = sum(sum(mask) * self._costs[name] for name, mask in masks.items())
            low, high = (middle, high) if cost <= self._budget else (low, middle - 1)
            with torch.no_grad():
                for name, layer in self._layers.items():
                    layer.lora_E[ADAPTER].copy_(before[name])
        return low

    def _by_site(self, pattern: Mapping[str, Sequence[bool]]) -> dict[str, list[bool]]:
        """Return PEFT's pattern, whose keys are full names of E, by site name."""
        return {name.split(".lora_E")[0]: list(mask) for name, mask in pattern.items()}
