"""A PEFT model whose ranks change in training: built, described, saved, restored, and made plain LoRA at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.plan import budget_of, revised
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adalora.fit import AdaLoraCallback, attach_adalora, audit_adalora, fold
from adaptive_lora.methods.adapters.attach import (
    ADAPTER,
    attach,
    detach,
    lora_config,
    lora_layers,
    read_head,
    write_head,
)
from adaptive_lora.methods.adapters.audit import audit_as_built, audit_moved
from adaptive_lora.methods.adapters.factors import write_factors
from adaptive_lora.methods.grow_prune.fit import GrowPruneCallback
from adaptive_lora.methods.ranks_in_training import RankChanges
from adaptive_lora.runner.plan import PlanReport


class ChangingAdapter:
    """The adapter of `grow_prune` or `adalora` on a model, and what changes its ranks."""

    changes: RankChanges
    """State of the method: ranks, and what decides the next ones."""

    def __init__(self, base: Any, report: PlanReport, *, seed: int, dropout: float) -> None:
        """Attach a method's adapters to a model at the starting ranks.

        Args:
            base: transformers model without adapters.
            report: plan of `grow_prune` or `adalora` for it.
            seed: seed of initial weights, of components that are added, and of dropout.
            dropout: dropout probability of LoRA's inputs.

        Raises:
            AllocationError: AdaLoRA's starting plan is not above the budget, or does not fit.
        """
        assert isinstance(report.plan, RankPlan)
        options, self._head = report.spec.options, report.head
        self.budget = budget_of(report.plan)
        """Maximum number of parameters of the final adapter."""
        self._dropout, self._seed, self._ended = dropout, seed, False
        self.model: Any
        """PEFT model; the same object becomes plain LoRA at the end."""
        if isinstance(options, AdaLora):
            self._start = options.start_plan(report.plan)
            self.model = attach_adalora(base, self._start, options, seed=seed, dropout=dropout, head=self._head)
            # Whoever trains adds the penalty once a step, as `changes.penalty`, whatever the loss is.
            self.model.peft_config[ADAPTER].orth_reg_weight = 0.0
            self.changes = AdaLoraCallback(self.model, self._start, options, self.budget)
        else:
            self._start = report.plan
            self.model = attach(base, self._start, seed=seed, dropout=dropout, head=self._head)
            self.changes = GrowPruneCallback(self.model, self._start, options, seed=seed)
        self.audit()

    @property
    def plan(self) -> RankPlan:
        """Plan at the present ranks."""
        return revised(self._start, self.changes.ranks())

    @property
    def sites(self) -> list[list[Any]]:
        """Name, inputs and outputs of every adapted site."""
        sites = (entry.site for entry in self._start.entries)
        return [[site.name, site.in_features, site.out_features] for site in sites]

    def audit(self) -> None:
        """Compare the model with the plan at its present ranks.

        Raises:
            AdapterError: there are differences; the message lists all of them.
        """
        if isinstance(self.changes, AdaLoraCallback) and not self._ended:
            audit_adalora(self.model, self._start, self._head)
        else:
            audit_as_built(self.model, self.plan, self._head)

    @contextmanager
    def described(self) -> Iterator[None]:
        """Let PEFT's configuration describe the tensors as they are, so that what the block saves can be loaded.

        PEFT would leave what AdaLoRA has pruned out of the file, and warn of sites that have no rank.
        """
        config = self.model.peft_config[ADAPTER]
        if isinstance(self.changes, AdaLoraCallback) and not self._ended:
            pattern, config.rank_pattern = config.rank_pattern, None
            try:
                yield
            finally:
                config.rank_pattern = pattern
        else:
            now = lora_config(self.model.get_base_model(), self.plan, 0.0)
            for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
                setattr(config, name, getattr(now, name))
            yield

    def state(self) -> dict[str, Any]:
        """Return all trained tensors and the method's state."""
        return {"weights": self._weights(), "changes": self.changes.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a value of `state`, whatever ranks the model has now."""
        self.changes.restore(state["changes"])
        with torch.no_grad():
            for name, weight in self._weights().items():
                weight.copy_(state["weights"][name])

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def end(self) -> PeftModel:
        """Make the model plain LoRA of its present ranks, with the same function, and return it.

        Raises:
            AdapterError: the model differs from its plan, or training did not reach a site.
        """
        if not self._ended:
            if isinstance(self.changes, AdaLoraCallback):
                self._fold(self.changes.kept)
            self._ended = True
            with self.described():
                pass  # PEFT's configuration still has the starting ranks
            if self._dropout > 0:  # the masks were those of the training's steps
                for layer in lora_layers(self.model).values():
                    layer.lora_dropout[ADAPTER] = nn.Dropout(self._dropout)
            self.audit()
            audit_moved(self.model)
        adapted: PeftModel = self.model
        return adapted

    def _fold(self, kept: Mapping[str, list[bool]]) -> None:
        """Replace AdaLoRA's layers in the model by plain LoRA with the same update."""
        final, model, base = self.plan, self.model, self.model.get_base_model()
        factors, head, training = fold(model, kept, final), read_head(model, self._head), model.training
        detach(model)
        plain = attach(base, final, seed=self._seed, dropout=self._dropout, head=self._head)
        write_factors(plain, factors)
        write_head(plain, head, self._head)
        model.base_model, model.peft_type = plain.base_model, plain.peft_type
        model.train(training)
