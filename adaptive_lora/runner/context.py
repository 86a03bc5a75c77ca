"""The context of a study's trials: a frozen base, its data, plans, profiles and scores, each made once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adaptive_lora.allocation import MethodSpec, Plan, TunerPlan, make_plan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import StudyConfig, TrialSpec, digest, shown
from adaptive_lora.config.parsing import earlier_settings
from adaptive_lora.config.retained import require_retained
from adaptive_lora.data import Batch
from adaptive_lora.errors import ModelError
from adaptive_lora.methods.adapters.attach import require_parameters
from adaptive_lora.methods.adapters.dropout import switch_off_dropout
from adaptive_lora.methods.importance import ImportanceProfile, ProfileTask
from adaptive_lora.models.base import load_base, require_quantiser
from adaptive_lora.models.collector import without_collector
from adaptive_lora.models.device import start_runtime
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.heads import start_head
from adaptive_lora.models.losses import Loss
from adaptive_lora.models.sharding import place, shard
from adaptive_lora.models.sites import read_architecture, unreached_layers, warn_of_sites
from adaptive_lora.models.tasks import Task, task_named
from adaptive_lora.models.tasks.prepared import PreparedSplits, prepare_set
from adaptive_lora.results import EvalResult
from adaptive_lora.runner import profiling
from adaptive_lora.runner.invocation import require_invocation
from adaptive_lora.runner.profiling import OWN, TaskData
from adaptive_lora.runner.prompt_room import require_room
from adaptive_lora.runner.retained import RetainedData, frozen_losses, read_retained
from adaptive_lora.serving import NF4
from adaptive_lora.training.memory import MemoryChoice, choose, describe, load_of

_TEXT_LIMIT, _TEXTS_LIMIT = 2_000, 5_000_000
"""Maximum number of characters kept of one example's text, and of all examples."""


class StudyContext:
    """A study's base and data, loaded once for all trials, and what is computed from them."""

    def __init__(self, config: StudyConfig, *, precision: str | None = None, trains: bool = True) -> None:
        """Read the data, load the base, and check all settings before anything is written.

        Args:
            config: settings, methods, seeds and learning rates.
            precision: compute type; None: that of the settings.
            trains: whether the methods will be trained, so that their ranks and budgets must fit the base.

        Raises:
            AdaptiveLoraError: data, model or precision cannot be used.
        """
        kind, self.config = task_named(config), config
        with without_collector():
            data = kind.read(config.data)
        sparing = config.train.max_memory is not None
        self.runtime = start_runtime(precision or config.train.precision, sparing=sparing, together=True)
        wanted = {spec.base for spec in config.specs}
        if BaseStorage.NF4 in wanted:
            require_quantiser()
        alone = wanted == {BaseStorage.NF4}  # the weights as saved may not fit the device
        self._load_base(kind, kind.record(data, config.data), NF4 if alone else None)
        self._on_bases = {self.base_kind: self}
        self.task.require_usable()
        with without_collector():
            prepared = prepare_set(self.task, data)
        self.data, self._splits, self.data_summary = prepared.data, prepared.folds, prepared.summary
        self._task_data: dict[tuple[str, ...], TaskData] = {}
        for spec in config.specs if trains else ():  # ranks and budgets that cannot be met fail before any training
            self.splits(0, spec.profiled_on)
            require_invocation(self, spec)
            if spec.options.metric is None:
                self.memory(self.plan(spec, seed=0, fold=0), fold=0)

    def _load_base(self, kind: type[Task], record: Mapping[str, Any], quantisation: Mapping[str, Any] | None) -> None:
        """Load the base onto the device, and set everything that depends on how its weights are stored.

        Args:
            kind: class of the task.
            record: record of the task that the base is loaded for.
            quantisation: record of the quantisation, or None.

        Raises:
            ModelError: the base cannot be loaded, or has no site.
        """
        divided = self.runtime.processes.sharded
        self.base = load_base(self.config.model, self.runtime.base_dtype, record, quantisation, divided=divided)
        if not self.config.train.base_dropout:
            switch_off_dropout(self.base.model)
        self.task = kind(self.config, self.runtime, self.base)
        self.loss: Loss = self.task.loss
        """Loss that training minimises and gradient profiles are computed from."""
        self.architecture = read_architecture(self.base.model)
        if divided:
            shard(self.base.model, self.runtime.device, self.base.head)
        else:
            self.base.model.to(self.runtime.device)  # type: ignore[arg-type]
        self.sites = self.architecture.sites
        warn_of_sites(self.base.model, self.architecture)
        self._unreached: frozenset[str] | None = None
        self._said: set[str] = set()
        self._profiles = profiling.ProfileCache(self)
        self._base_scores: dict[int, EvalResult] = {}

    @property
    def base_kind(self) -> str:
        """Storage of the base's weights: `full`, or the name of the quantisation."""
        quantisation = self.base.quantisation
        return BaseStorage.FULL if quantisation is None else str(quantisation["scheme"])

    def on_base(self, kind: str) -> StudyContext:
        """Return the context with the base stored in this way; the unused base is moved off a GPU.

        The second base of a study of both LoRA and QLoRA is loaded on first use.

        Raises:
            ConfigError: bitsandbytes is missing.
        """
        for other, context in self._on_bases.items():
            if other != kind and not self.runtime.processes.sharded:
                context.base.model.to("cpu")  # type: ignore[arg-type]
        if kind not in self._on_bases:
            second = copy.copy(self)
            second._load_base(type(self.task), self.base.task, None if kind == BaseStorage.FULL else NF4)
            self._on_bases[kind] = second
        place(self._on_bases[kind].base.model, self.runtime.device)
        return self._on_bases[kind]

    def leave_device(self) -> None:
        """Move all bases off a GPU, for other processes; `on_base` brings the one that it is asked for back."""
        for context in self._on_bases.values():
            context.base.model.to("cpu")  # type: ignore[arg-type]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """Part of a trial's identity besides its configuration: digests of base and data, and precision."""
        return {
            "base": self.base.reference.content_hash,
            "data": self.data.digest,
            "tokens": self.tokens_digest,
            "precision": self.runtime.precision,
            **({"left_out": digest(reasons)} if (reasons := self.data.reasons) else {}),
            # Left out for causal tasks, so that trials from before there were tasks keep their identity.
            **({} if self.task.name == "causal" else {"task": self.task.name}),
        }

    @cached_property
    def tokens_digest(self) -> str:
        """Digest of the token ids and loss masks of all splits.

        All folds split the same examples, so that the first fold has all of them.
        """
        return self.splits(0).digest

    def signature(self, trial: TrialSpec) -> str:
        """Return a trial's identity on this base, this data and the data of its profile."""
        other = self._data_of(trial.method.profiled_on)
        return trial.signature({**self.fingerprint, **({} if other is None else {"profiled_on": other.digest})})

    @cached_property
    def study_id(self) -> str:
        """Name of the study, and a digest of the settings that its trials share.

        Methods, seeds and learning rates do not enter, so that a study can be extended by some.
        """
        shared = {**self.config.identity(), **self.fingerprint}
        return f"{self.config.study}-{digest(shared)[:10]}"

    @cached_property
    def study_key(self) -> str:
        """Digest of the study's settings by names, equal for equal commands.

        Two study ids with one study key mean that base or data changed under the same name.
        """
        return self._study_key(self.config.identity())

    def earlier_study_keys(self) -> list[str]:
        """Return the study keys of version 0.1 for studies of this name and these settings."""
        return [self._study_key(identity) for identity in earlier_settings(self.config.identity())]

    def _study_key(self, identity: Mapping[str, Any]) -> str:
        named = {**vars(self.config.model), **vars(self.config.data)}
        del named["on_bad_row"]  # version 0.1 did not have this setting
        for later in ("audio_column", "language"):  # which change no key where they are not used
            if named[later] is None:
                del named[later]
        for key, value in named.items():
            if isinstance(value, str) and Path(value).exists():
                named[key] = str(Path(value).resolve())  # a relative path depends on the folder
        contents = {"base", "data", "tokens", "left_out"}
        rest = {key: value for key, value in self.fingerprint.items() if key not in contents}
        return digest({**identity, **named, **rest, "study": self.config.study})

    def splits(self, fold: int, tasks: tuple[str, ...] = ()) -> PreparedSplits:
        """Return the prepared splits of a fold: the study's, or those of the tasks of `profiled_on`.

        Raises:
            DataError: a task's data cannot be read.
        """
        other = self._data_of(tasks)
        return self._splits[fold] if other is None else other.folds[fold]

    def _data_of(self, tasks: tuple[str, ...]) -> TaskData | None:
        """Return the data of `profiled_on`, read once; None for the study's own."""
        if not tasks or tasks == (OWN,):
            return None
        if tasks not in self._task_data:
            self._task_data[tasks] = profiling.read_tasks(self.task, tasks, self.data, self._splits)
        return self._task_data[tasks]

    def data_lines(self) -> list[str]:
        """Return the lines of the data summary printed at the start of a run: own, other tasks' and retained data."""
        others = (one for data in self._task_data.values() for one in data.summaries)
        summaries = [self.data_summary, *others, *(one.summary for one in self.retained)]
        return [line for summary in summaries for line in summary.lines()]

    def data_record(self) -> dict[str, Any]:
        """Return the record of the study's own and its retained data as JSON-ready values."""
        own = self.data_summary.to_dict()
        others = [one.summary.to_dict() for one in self.retained]
        if not others:
            return own
        return {**own, "retained": others, "block": [line for one in (own, *others) for line in one["block"]]}

    def start_head(self, seed: int) -> None:
        """Initialise the task's head from a seed, if the checkpoint lacks it."""
        start_head(self.base.model, self.base.missing_keys, seed=seed)

    def score(self, model: object, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples by all scores of the task."""
        return self.task.score(model, examples)  # type: ignore[arg-type]

    def losses(self, model: object, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples without generating."""
        return self.task.losses(model, examples)  # type: ignore[arg-type]

    def base_scores(self, fold: int) -> EvalResult:
        """Return the base scores: those of the base without adapter on the fold's test split.

        A head missing in the checkpoint has the initial weights of the first seed.
        """
        if fold not in self._base_scores:
            self.on_base(self.base_kind)
            self.start_head(0)
            with model_errors(f"{self.architecture.kind} does not run on this data", self.base.model):
                self._base_scores[fold] = self.score(self.base.model, self.splits(fold).test)
        return self._base_scores[fold]

    @cached_property
    def retained(self) -> tuple[RetainedData, ...]:
        """The retained data of the study; empty without `retain_data`.

        Raises:
            DataError: they cannot be read or used.
        """
        require_retained(self.config)
        with without_collector():
            return read_retained(self.task, self.data, self._splits)

    @cached_property
    def retained_before(self) -> Mapping[str, EvalResult]:
        """Digest of retained data -> scores of the base without adapter, with the head of `base_scores`.

        Raises:
            ModelError: the base gives a loss that is not finite.
        """
        return frozen_losses(self)

    def test_texts(self) -> dict[str, str]:
        """Return id -> text of the test examples, for readers without the data."""
        tested = {item.id for splits in self._splits for item in splits.test}
        texts: dict[str, str] = {}
        room = _TEXTS_LIMIT
        for example in self.data.every:
            if example.id in tested and room > 0:
                texts[example.id] = example.shown[:_TEXT_LIMIT]
                room -= len(texts[example.id])
        return texts

    def settings(self) -> dict[str, Any]:
        """Return the settings to record, without the tracking URI, which may have a password."""
        return {key: value for key, value in self.config.flat().items() if key != "tracking_uri"}

    def profile_of(self, spec: MethodSpec, *, seed: int, fold: int) -> ImportanceProfile | None:
        """Return the importance profile that a method follows; None where it follows none."""
        if (metric := spec.options.metric) is None:
            return None
        return self.profile(metric, seed=seed, fold=fold, tasks=spec.profiled_on, experts=spec.experts)

    def profile(
        self, metric: str, *, seed: int, fold: int, tasks: tuple[str, ...] = (), experts: bool = False
    ) -> ImportanceProfile:
        """Return the profile of a seed by one metric, with the arguments of `profiles`."""
        return self.profiles((metric,), seed=seed, fold=fold, tasks=tasks, experts=experts)[metric]

    def profiles(
        self, metrics: Sequence[str], *, seed: int, fold: int, tasks: tuple[str, ...] = (), experts: bool = False
    ) -> Mapping[str, ImportanceProfile]:
        """Return the profiles of a seed, each measured once on the training split of the fold and tasks."""
        return self._profiles.get(metrics, profiling.Calibration(tasks=tasks, seed=seed, fold=fold, experts=experts))

    def profile_task(self, *, seed: int, fold: int, tasks: tuple[str, ...] = (), experts: bool = False) -> ProfileTask:
        """Return the inputs of profilers for a seed, fold and tasks, with routed experts where wanted."""
        self.start_head(seed)
        splits = self.splits(fold, tasks)
        return ProfileTask(
            model=self.base.model,
            sites=self.architecture.sites_of(experts),
            batches=self._drawn(splits.train, seed, "calibration", fold),
            runtime=self.runtime,
            loss=self.loss,
            validation=self._drawn(splits.validation, seed, "ablation", fold),
            trained=lambda: profiling.trained_probe(self, splits, seed=seed, fold=fold),
            running=self.task.running,
            limits=profiling.pass_limits(self, splits.longest),
        )

    def calibration(self, seed: int, fold: int) -> list[Batch]:
        """Return the calibration batches of a seed."""
        return self._drawn(self.splits(fold).train, seed, "calibration", fold)

    def _drawn(self, examples: Sequence[Any], seed: int, purpose: str, fold: int) -> list[Batch]:
        batches = profiling.drawn(examples, self.config.profile, seed=seed, purpose=purpose, fold=fold)
        return [self.task.collate(batch) for batch in batches]

    def plan(self, spec: MethodSpec, *, seed: int, fold: int) -> Plan:
        """Return a method's plan; data-driven methods are profiled for the seed and fold.

        Raises:
            AllocationError: the method cannot be planned.
            ConfigError: examples and virtual tokens do not fit the base.
            ModelError: adapters would be on sites without influence on the loss.
        """
        measured, train = self.profile_of(spec, seed=seed, fold=fold), self.config.train
        profile = None if measured is None else measured.summary()
        plan = make_plan(spec, self.architecture, alpha=train.alpha, scaling=train.scaling, profile=profile, seed=seed)
        if isinstance(plan, TunerPlan) and plan.positions:
            require_room(self, plan, fold)
        if unreached := self._without_influence().intersection(plan.sites):
            raise ModelError(
                f"{plan.method} puts adapters on {len(unreached)} linear layers of "
                f"{self.architecture.kind} that do not reach the loss of this task and would learn "
                f"nothing, such as {min(unreached)}; leave them out by placement, roles, layers, "
                "towers or target_names."
            )
        if not isinstance(plan, TunerPlan):
            require_parameters(self.base.model, plan, train.dropout)
            if plan.certificate is not None and plan.certificate.reason:
                self._say(f"{plan.method}: the ranks gain no more than uniform's: {plan.certificate.reason}")
        return plan

    def _say(self, text: str) -> None:
        """Log a text once."""
        if text not in self._said:
            self._said.add(text)
            logging.getLogger(__name__).warning(text)

    def _without_influence(self) -> frozenset[str]:
        """Return the names of sites without influence on an example's loss, among those not checked before."""
        if self._unreached is None:
            untried, found = sorted(self.architecture.untried_by(text=self.task.name == "causal")), frozenset[str]()
            if untried:
                batch = self.task.collate(self.splits(0).train[:2]).to(self.runtime.device)
                model, kind = self.base.model, self.architecture.kind
                with model_errors(f"{kind} does not run on this data", model), self.runtime.accelerator.autocast():
                    found = frozenset(unreached_layers(model, untried, lambda: self.task.loss(model, batch)))
            self._unreached = found
        return self._unreached

    def memory(self, plan: Plan, fold: int) -> MemoryChoice:
        """Return the memory settings for a plan's training; with a memory limit, log them.

        Raises:
            ConfigError: not even one example fits into the limit.
        """
        load = load_of(
            self.base.model,
            (*self.sites, *self.architecture.experts),
            plan,
            precision=self.runtime.precision,
            longest=self.splits(fold).longest,
            fused=self.config.train.batching != "padded",
            packed=self.task.packs(self.base.model),
            head=self.base.head,
        )
        choice = choose(load, self.config.train)
        if self.config.train.max_memory is not None:
            self._say(f"max_memory {shown(self.config.train.max_memory)}: {describe(choice, load)}")
        return choice
