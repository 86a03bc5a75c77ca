"""The context of one trial on the shared base: plan, adapter and training for its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from adaptive_lora.allocation import MethodSpec, RankPlan, SiteRank, TunerPlan
from adaptive_lora.config import TrialSpec
from adaptive_lora.data import Batch
from adaptive_lora.methods.adapters import attach, audit_as_built, detach
from adaptive_lora.methods.adapters.attach import initial_a, read_head, write_head
from adaptive_lora.methods.base import TrainerCallback
from adaptive_lora.methods.importance import ImportanceProfile, ProfileTask
from adaptive_lora.models.base import gradient_checkpointing
from adaptive_lora.models.sharding import place
from adaptive_lora.results import TrainResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.invocation import invocation_ids
from adaptive_lora.training import StepEvent, Trainer, TrainInputs, TrialCheckpoints, events_of, total_steps

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", RankPlan, TunerPlan)


class TrialOnBase:
    """A `methods.base.TrialContext`. At most one adapter is on the base at a time."""

    def __init__(
        self,
        context: StudyContext,
        trial: TrialSpec,
        on_step: Callable[[StepEvent], None],
        checkpoints: TrialCheckpoints | None = None,
    ) -> None:
        """Prepare a trial without changing the base.

        Args:
            context: base, data and plans.
            trial: trial to run.
            on_step: function called after every optimiser step, also for those of a checkpoint.
            checkpoints: checkpoints to continue from and to write.
        """
        self._checkpoints = checkpoints
        self.context, self.trial = context.on_base(trial.method.base), trial
        self._on_step = on_step
        self._adapted: Any = None
        self._undo: Callable[[Any], None] = detach
        self._steps_before = 0
        self.trainings = 0
        """Number of trainings so far."""
        self._head: dict[str, torch.Tensor] = {}
        context.start_head(trial.seed)

    @property
    def head(self) -> tuple[str, ...]:
        """Names of modules that the task trains in addition to the method's parameters."""
        return self.context.base.head

    @cached_property
    def plan(self) -> RankPlan:
        """The method's rank plan before training; its parameters are the budget of the final adapter."""
        return self._planned(RankPlan)

    @cached_property
    def tuner_plan(self) -> TunerPlan:
        """The plan of a method that gives no ranks."""
        return self._planned(TunerPlan)

    def _planned(self, kind: type[P]) -> P:
        plan = self.context.plan(self.trial.method, seed=self.trial.seed, fold=self.trial.fold)
        assert isinstance(plan, kind)
        return plan

    @property
    def method(self) -> MethodSpec:
        """Method specification, with the options that all methods share."""
        return self.trial.method

    @property
    def seed(self) -> int:
        """Seed of the trial."""
        return self.trial.seed

    @property
    def dropout(self) -> float:
        """Dropout probability of LoRA's inputs in training."""
        return self.trial.config.train.dropout

    @property
    def steps(self) -> int:
        """Number of optimiser steps of one training."""
        train_part = self.context.splits(self.trial.fold).train
        return total_steps(len(train_part), self.trial.config.train)

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base."""
        return self.context.base.model

    def calibration(self) -> list[Batch]:
        """Return the calibration batches of the seed, from the training split."""
        return self.context.calibration(self.trial.seed, self.trial.fold)

    def profile_task(self) -> ProfileTask:
        """Return the inputs of importance profilers for the seed and fold."""
        return self.context.profile_task(seed=self.seed, fold=self.trial.fold)

    def profile(self, metric: str) -> ImportanceProfile:
        """Return the profile of the seed and fold by a metric, measured once in a study."""
        return self.context.profile(metric, seed=self.seed, fold=self.trial.fold, experts=self.method.experts)

    def initial_a(self, entry: SiteRank) -> torch.Tensor:
        """Return a site's initial A in `attach`."""
        site = entry.site
        a = initial_a(self.trial.seed, site.name, entry.rank, site.in_features, site.experts)
        return a.to(self.context.runtime.device)

    def attach(self, plan: RankPlan, *, head_as_trained: bool = False) -> PeftModel:
        """Build a plan on the base with the seed's initial weights, and audit it as built.

        Args:
            plan: plan to build.
            head_as_trained: whether the task's head starts from that of the adapter released before.

        Raises:
            AdapterError: the model as built differs from the plan.
            ProcessLost: the plan differs between the processes that train the trial.
        """
        processes = self.context.runtime.processes
        if processes.together:
            processes.require_equal(f"the plan of {plan.method}", plan.to_json())
        invocation = invocation_ids(self.context, plan.invocation)
        adapted = self.adopt(
            attach(self.base, plan, seed=self.trial.seed, dropout=self.dropout, head=self.head, invocation=invocation)
        )
        if head_as_trained:
            write_head(adapted, self._head, self.head)
        audit_as_built(adapted, plan, self.head)
        return adapted

    def adopt(self, adapted: M, undo: Callable[[Any], None] = detach) -> M:
        """Register an adapted base, on the trial's device, until it is released.

        Args:
            adapted: base with the method's additions.
            undo: function that restores the base.
        """
        self._adapted, self._undo = adapted, undo
        place(adapted, self.context.runtime.device)
        return adapted

    def release(self) -> None:
        """Restore the base."""
        if self._adapted is not None:
            self._head = read_head(self._adapted, self.head)
            self._undo(self._adapted)
            self._adapted = None

    def validation_loss(self, model: object) -> float:
        """Return a model's loss on the validation split, in nats per supervised token."""
        return self.context.losses(model, self.context.splits(self.trial.fold).validation).loss

    def probe(self, model: Any) -> torch.Tensor:
        """Return a model's outputs for the first training examples, shape (up to 4, ...), float32."""
        return self.context.task.probe(model, self.context.splits(self.trial.fold).train)

    def train(self, adapted: nn.Module, callback: TrainerCallback | None = None, *, trainings: int = 1) -> TrainResult:
        """Train the adopted model on the trial's training split, from its last checkpoint on.

        Args:
            adapted: attached or adopted model.
            callback: callback of the method.
            trainings: total number of trainings of the method; steps are counted over all.

        Raises:
            TrialFailed: training was not stable.
        """
        context, config = self.context, self.trial.config.train
        self.trainings += 1
        splits = context.splits(self.trial.fold)
        before = self._steps_before
        plan = self.plan if self.method.options.gives_ranks else self.tuner_plan

        def on_step(event: StepEvent) -> None:
            self._steps_before = before + event.step
            self._on_step(
                dataclasses.replace(event, step=self._steps_before, total_steps=event.total_steps * trainings)
            )

        memory = context.memory(plan, self.trial.fold)
        config = dataclasses.replace(config, gradient_checkpointing=memory.checkpointing)
        resumable = self._resumable(adapted, on_step)
        inputs = TrainInputs(
            examples=splits.train,
            collate=context.task.collate,
            validate=self.validation_loss,
            loss=context.loss,
            losses_by_example=context.task.losses_by_example,
            running=context.task.running,
            on_step=on_step,
            lr_multipliers=plan.lr_multipliers(),
            lora_plus=plan.lora_plus,
            callback=callback or TrainerCallback(),
            micro_batch=memory.micro_batch,
            memory=memory.whole,
            **resumable,
        )
        with gradient_checkpointing(self.base, config.gradient_checkpointing):
            return Trainer(adapted, inputs, config, context.runtime, lr=self.trial.lr, seed=self.trial.seed).run()

    def _resumable(self, adapted: nn.Module, on_step: Callable[[StepEvent], None]) -> dict[str, Any]:
        """Return the inputs of a training that continues; earlier steps are reported again."""
        kept = None if self._checkpoints is None else self._checkpoints.of(self.trainings, adapted)
        snapshot = None if kept is None else kept.latest()
        processes = self.context.runtime.processes
        if processes.together:
            snapshot = processes.share(snapshot)  # the first process alone reads and writes checkpoints
        if snapshot is not None:
            for event in events_of(snapshot, self.steps):
                on_step(event)
        return {"resume": snapshot, **({} if kept is None else {"on_snapshot": kept.stepped, "on_stop": kept.write})}
