"""The context of methods: a frozen base, its data and the loss."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

from torch import nn

from adaptive_lora.allocation import MethodSpec, Plan, TunerPlan, allocate, make_plan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import shown
from adaptive_lora.data import Batch
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.methods.adapters import attach, detach
from adaptive_lora.methods.importance import ImportanceProfile, ProfileTask, TrainedProbe, profile_importance
from adaptive_lora.methods.importance.capture import frozen
from adaptive_lora.models.base import gradient_checkpointing
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.heads import start_head
from adaptive_lora.models.losses import Loss
from adaptive_lora.models.sites import read_architecture, unreached_layers, warn_of_sites
from adaptive_lora.models.tasks import Task
from adaptive_lora.models.tasks.prepared import PreparedSplits
from adaptive_lora.results import EvalResult
from adaptive_lora.seeding import rng_for, torch_stream
from adaptive_lora.training import TrainInputs, train
from adaptive_lora.training.memory import MemoryChoice, choose, describe, load_of


class BaseContext(ABC):
    """Base class of contexts: the frozen base, its data and the loss, which methods need to run."""

    def __init__(self, task: Task) -> None:
        """Move a task's base to the runtime's device; raises ModelError if it has no site."""
        self.task = task
        self.config, self.runtime, self.base = task.config, task.runtime, task.base
        self.loss: Loss = task.loss
        """Loss that training minimises and gradient profiles are computed from."""
        self.base.model.to(self.runtime.device)  # type: ignore[arg-type]
        self.architecture = read_architecture(self.base.model)
        self.sites = self.architecture.sites
        warn_of_sites(self.base.model, self.architecture.survey)
        self._said: set[str] = set()
        self._profiles: dict[tuple[str, int, int], ImportanceProfile] = {}

    @property
    def base_kind(self) -> str:
        """Storage of the base's weights: `full`, or the name of the quantisation."""
        quantisation = self.base.quantisation
        return BaseStorage.FULL if quantisation is None else str(quantisation["scheme"])

    def on_base(self, kind: str) -> BaseContext:
        """Return the context with the base stored in this way, on its device.

        Raises:
            ConfigError: this context has no other base, or bitsandbytes is missing.
        """
        if kind != self.base_kind:
            raise ConfigError(f"base={kind} needs a study of your own: required base=full here.")
        return self

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context manager for training: fused kernels where they are supported."""
        return self.task.running(model)

    def profiled_on(self, tasks: tuple[str, ...]) -> BaseContext:
        """Return the context for the importance profiles of a method with `profiled_on`.

        Raises:
            ConfigError: this context has no other tasks.
        """
        if tasks:
            raise ConfigError(f"profiled_on={'+'.join(tasks)} needs a study with data of its own.")
        return self

    def start_head(self, seed: int) -> None:
        """Initialise the task's head from a seed, if the checkpoint lacks it."""
        start_head(self.base.model, self.base.missing_keys, seed=seed)

    @abstractmethod
    def splits(self, fold: int) -> PreparedSplits:
        """Return the prepared splits of a fold."""

    def profile(self, metric: str, *, seed: int, fold: int) -> ImportanceProfile:
        """Return the importance profile of a seed, measured once on the fold's training split."""
        key = (metric, seed, fold)
        if key not in self._profiles:
            task = self.profile_task(seed=seed, fold=fold)
            with model_errors(f"{metric} cannot be measured on {self.architecture.kind}", self.base.model):
                self._profiles[key] = profile_importance(task, metric=metric, seed=seed)
        return self._profiles[key]

    def profile_task(self, *, seed: int, fold: int) -> ProfileTask:
        """Return the inputs of profilers for a seed and fold."""
        self.start_head(seed)
        return ProfileTask(
            model=self.base.model,
            sites=self.sites,
            batches=self.calibration(seed, fold),
            runtime=self.runtime,
            loss=self.loss,
            validation=self._drawn(self.splits(fold).validation, seed, "ablation", fold),
            trained=lambda: self._trained_probe(seed, fold),
        )

    @contextmanager
    def _trained_probe(self, seed: int, fold: int) -> Iterator[TrainedProbe]:
        """Train adapters of one rank on every site for a short while; remove them at the end of the block.

        Uses the study's settings and the middle one of its learning rates.
        """
        model, settings = self.base.model, self.config.train
        config = dataclasses.replace(
            settings, epochs=min(settings.epochs, self.config.profile.probe_epochs), patience=0
        )
        rank = min(self.config.profile.probe_rank, *(site.max_rank for site in self.sites))
        plan = allocate(
            MethodSpec.build("uniform", {"rank": rank}), self.sites, alpha=settings.alpha, scaling=settings.scaling
        )
        rates = sorted(self.config.lr)
        inputs = TrainInputs(
            examples=self.splits(fold).train,
            collate=self.task.collate,
            validate=lambda adapted: self.losses(adapted, self.splits(fold).validation).loss,
            loss=self.loss,
            running=self.running,
        )
        with frozen(model), torch_stream(seed, "probe", fold):
            adapted = attach(model, plan, seed=seed, dropout=settings.dropout, head=self.base.head)
            try:
                adapted.to(self.runtime.device)
                with gradient_checkpointing(model, config.gradient_checkpointing):
                    result = train(adapted, inputs, config, self.runtime, lr=rates[len(rates) // 2], seed=seed)
                yield TrainedProbe(model=adapted, tokens=result.tokens)
            finally:
                detach(adapted)

    def calibration(self, seed: int, fold: int) -> list[Batch]:
        """Return the calibration batches of a seed, drawn from the fold's training split."""
        return self._drawn(self.splits(fold).train, seed, "calibration", fold)

    def _drawn(self, examples: Sequence[Any], seed: int, purpose: str, fold: int) -> list[Batch]:
        config = self.config.profile
        size = config.profile_batch_size
        order = rng_for(seed, purpose, fold).permutation(len(examples))
        order = order[: config.profile_batches * size]
        return [
            self.task.collate([examples[index] for index in order[start : start + size]])
            for start in range(0, len(order), size)
        ]

    def plan(self, spec: MethodSpec, *, seed: int, fold: int) -> Plan:
        """Return a method's plan; data-driven methods are profiled for the seed and fold.

        Raises:
            AllocationError: the method cannot be planned.
            ConfigError: examples and virtual tokens do not fit the base.
            ModelError: adapters would be on sites without influence on the loss.
        """
        metric = spec.options.metric
        profile = None
        if metric is not None:
            where = self.profiled_on(spec.profiled_on)
            profile = where.profile(metric, seed=seed, fold=fold).summary()
        plan = make_plan(
            spec,
            self.architecture,
            alpha=self.config.train.alpha,
            scaling=self.config.train.scaling,
            profile=profile,
            seed=seed,
        )
        if isinstance(plan, TunerPlan):
            if plan.positions:
                self._check_prompt(plan, fold)
        elif unreached := self._unreached & plan.rank_pattern().keys():
            raise ModelError(
                f"{plan.method} puts adapters on {len(unreached)} linear layers of "
                f"{self.architecture.kind} that do not reach the loss of this task and would learn "
                f"nothing, such as {min(unreached)}; leave them out by placement, roles, layers, "
                "towers or target_names."
            )
        return plan

    @cached_property
    def _unreached(self) -> frozenset[str]:
        """Names of sites without influence on the loss of an example, among those not checked before."""
        untried = sorted(self.architecture.untried)
        if not untried:
            return frozenset()
        batch = self.task.collate(self.splits(0).train[:2]).to(self.runtime.device)
        model = self.base.model
        kind = self.architecture.kind
        with model_errors(f"{kind} does not run on this data", model), self.runtime.accelerator.autocast():
            found = unreached_layers(model, untried, lambda: self.task.loss(model, batch))
        return frozenset(found)

    def _check_prompt(self, plan: TunerPlan, fold: int) -> None:
        """Check that examples with their virtual tokens fit the base, and that a prefix can be trained.

        Raises:
            ConfigError: they do not; the message gives the setting to change.
        """
        splits, most = self.splits(fold), self.base.max_positions
        longest = max(item.length for item in (*splits.train, *splits.validation, *splits.test))
        if most is not None and longest + plan.positions > most:
            raise ConfigError(
                f"{plan.method}: its {plan.positions} virtual tokens and the longest example "
                f"({longest} tokens) are more than the base's {most} positions; set max_tokens to "
                f"{most - plan.positions} or take fewer virtual tokens."
            )
        if plan.family == "prefix_tuning" and self.config.train.gradient_checkpointing:
            raise ConfigError(
                f"{plan.method} keeps its prefix in the cache, which gradient checkpointing does "
                "not have; set gradient_checkpointing to false or leave the method out."
            )

    def memory(self, plan: Plan, fold: int) -> MemoryChoice:
        """Return the memory settings for a plan's training; with a memory limit, log them.

        Raises:
            ConfigError: not even one example fits into the limit.
        """
        longest = max(example.length for example in self.splits(fold).train)
        load = load_of(
            self.base.model,
            self.sites,
            plan,
            precision=self.runtime.precision,
            longest=longest,
            fused=self.config.train.batching != "padded",
            packed=self.task.packs(self.base.model),
            head=self.base.head,
        )
        choice = choose(load, self.config.train)
        if self.config.train.max_memory is not None:
            said = f"max_memory {shown(self.config.train.max_memory)}: {describe(choice, load)}"
            if said not in self._said:
                self._said.add(said)
                logging.getLogger(__name__).warning(said)
        return choice

    def losses(self, model: object, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples without generating."""
        return self.task.losses(model, examples)  # type: ignore[arg-type]
