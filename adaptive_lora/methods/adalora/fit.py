"""AdaLoRA: PEFT's allocator, called before gradients are cleared, then folded into plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.revised import budget_of, revised
from adaptive_lora.errors import TrialFailed
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adalora.layers import (
    adalora_layers,
    attach_adalora,
    audit_adalora,
    fold,
    training_parameters,
)
from adaptive_lora.methods.adapters.attach import ADAPTER
from adaptive_lora.methods.adapters.audit import audit_moved
from adaptive_lora.methods.adapters.factors import write_factors
from adaptive_lora.methods.base import RankEvent, TrainedTrial, TrialContext
from adaptive_lora.methods.callback import TrainerCallback
from adaptive_lora.methods.phases import Phases


def fit_adalora(options: AdaLora, trial: TrialContext) -> TrainedTrial:
    """Train AdaLoRA layers, then fold their updates into a plain LoRA adapter of mixed ranks."""
    start = options.start_plan(trial.plan)
    phases = options.phases(trial.steps)
    adapted = trial.adopt(
        attach_adalora(trial.base, start, options, phases, seed=trial.seed, dropout=trial.dropout, head=trial.head)
    )
    audit_adalora(adapted, start, trial.head)
    callback = AdaLoraCallback(adapted, start, phases, budget_of(trial.plan))
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


class AdaLoraCallback(TrainerCallback):
    """Calls `update_and_allocate` after each optimiser step, before gradients are cleared.

    The state has what PEFT does not save: sensitivities and the mask over un-resized tensors. A run
    resumed through PEFT's own checkpoint counts the pruned ranks twice.
    """

    def __init__(self, adapted: PeftModel, start: RankPlan, phases: Phases, budget: int) -> None:
        """Prepare for a model that was just attached.

        Args:
            adapted: model with AdaLoRA layers.
            start: starting plan of the model.
            phases: phases of rank changes.
            budget: maximum number of parameters of the folded adapter.
        """
        self.kept = {entry.site.name: [True] * entry.rank for entry in start.entries}
        self.history = [RankEvent(step=0, ranks=self.ranks())]
        self._tuner: Any = adapted.base_model
        self._layers = adalora_layers(adapted)
        self._phases, self._budget = phases, budget
        self._costs = {e.site.name: e.site.parameters_per_rank for e in start.entries}

    def ranks(self) -> dict[str, int]:
        """Return site name -> number of remaining triplets."""
        return {name: sum(mask) for name, mask in self.kept.items()}

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Check that the schedule was made for this training."""
        assert steps == self._phases.steps

    def penalty(self) -> torch.Tensor | None:
        """Return the weighted mean of ‖QQᵀ - I‖ and ‖PᵀP - I‖ (section 3.1, as in PEFT)."""
        weight = float(self._config.orth_reg_weight)
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
        settle, allocator = self._phases.settle, self._allocator
        if step < settle and not taken:
            return  # no gradient to learn from
        if step == settle and not allocator.exp_avg_ipt:
            raise TrialFailed(
                f"AdaLoRA must decide ranks at step {settle}, but every step so far was skipped as "
                "not finite. Lower the learning rate or use precision bf16 or fp32."
            )
        if self._phases.due(step) and allocator.exp_avg_ipt:
            allocator.target_bgt = self._affordable_ranks()
        self._tuner.update_and_allocate(step)
        if self._phases.due(step) and self._config.rank_pattern:
            self._read(step, self._config.rank_pattern)

    def settled(self, step: int) -> bool:
        """Return whether the last pruning is done."""
        return step >= self._phases.settle

    def state(self) -> dict[str, Any]:
        """Return sensitivities, mask and target."""
        allocator = self._allocator
        return {
            "sensitivity": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
            "target": allocator.target_bgt,
            "rank_pattern": self._config.rank_pattern,
            "kept": self.kept,
            "history": [[event.step, event.ranks] for event in self.history],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore them in PEFT's allocator."""
        allocator = self._allocator
        allocator.exp_avg_ipt, allocator.exp_avg_unc = state["sensitivity"], state["uncertainty"]
        allocator.ipt = dict.fromkeys(state["sensitivity"])  # the known parameters; recomputed at each step
        allocator.target_bgt = state["target"]
        self._config.rank_pattern = state["rank_pattern"]
        self.kept = state["kept"]
        self.history = [RankEvent(step=step, ranks=ranks) for step, ranks in state["history"]]

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

    def _read(self, step: int, pattern: Mapping[str, Sequence[bool]]) -> None:
        self.kept = self._by_site(pattern)
        self.history.append(RankEvent(step=step, ranks=self.ranks()))

    def _by_site(self, pattern: Mapping[str, Sequence[bool]]) -> dict[str, list[bool]]:
        """Return PEFT's pattern, whose keys are full names of E, by site name."""
        return {name.split(".lora_E")[0]: list(mask) for name, mask in pattern.items()}
