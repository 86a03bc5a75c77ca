"""`plan`: the plan of a method on a base, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import MethodSpec, Plan, RankPlan, allocate, make_plan, uniform_cost
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.base_file import base_file
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import AllocationError, ConfigError
from adaptive_lora.models.base import count_parameters, skeleton
from adaptive_lora.models.device import resolve_precision
from adaptive_lora.models.heads import find_head, own_head
from adaptive_lora.models.sites import read_architecture, site_notes
from adaptive_lora.runner.emit import Emitted, emit
from adaptive_lora.runner.gpus import engine_advice, gpu_table
from adaptive_lora.runner.plan_table import PlanTable, as_html, as_text, plan_table
from adaptive_lora.serving import TASKS, SavedQuantisation, quantisation_in
from adaptive_lora.training.memory import GpuNeed, Load, MemoryChoice, Storage, choose, gpu_needs, load_of, storage_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adaptive_lora.methods.importance import ImportanceProfile


_BF16 = Precision.BF16.number_bytes


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class PlanReport:
    """A plan, with the sizes to compare it with."""

    plan: Plan
    spec: MethodSpec
    architecture: Architecture
    """Sites of the base, adapted or not, and its other tensors and sizes."""
    base: PreTrainedModel | None = None
    """The base: on the meta device without weights, or the model that was given; None: planned from a profile alone."""
    base_name: str = ""
    load: Load | None = None
    """Sizes of its training that determine the memory; None without a base."""
    memory: MemoryChoice | None = None
    """Settings that keep its training within the memory limit; None without a base."""
    needs: tuple[GpuNeed, ...] = ()
    """Number of GPUs of each common size for one trial; empty without a base."""
    head: tuple[str, ...] = ()
    """Names of modules that the task trains in addition to the plan."""

    def emit(self, form: str = "peft", *, adapter: str | Path | None = None, seed: int = 0) -> Emitted:
        """Return the plan in the form that a fine-tuning tool reads.

        Args:
            form: `peft`, `axolotl`, `llamafactory`, `torchtune` or `unsloth`.
            adapter: new folder for an untrained adapter of the plan, from which axolotl and LLaMA-Factory start.
            seed: seed of that adapter's A, as of a trial.

        Raises:
            ConfigError: the tool cannot read the plan; the message has the reason.
        """
        return emit(self, form, adapter=None if adapter is None else Path(adapter), seed=seed)

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """All sites of the base, adapted or not."""
        return self.architecture.sites

    @property
    def note(self) -> str | None:
        """Remarks on the ranks, saved weights, layers left out, or an untested architecture; or None."""
        notes = list(self.plan.notes)
        if isinstance(self.plan, RankPlan) and self.spec.options.ranks_in_training:
            notes.append(
                f"{self.plan.method} decides its ranks later, from data; equal ranks are shown for its budget."
            )
        if self.base is not None:
            saved = _saved(self.base)
            if saved is not None and saved.use == "dequantised" and next(self.base.parameters()).is_meta:
                notes.append(f"The base is saved in {saved.name}; training uses the dequantised weights.")
            notes += site_notes(self.base, self.architecture)
        return " ".join(filter(None, notes)) or None

    @property
    def table(self) -> PlanTable:
        """Rows of the plan: one per adapter site, or per kind of tensor of a tuner without ranks."""
        return plan_table(self)

    @property
    def gpus(self) -> PlanTable:
        """Number of GPUs of each common size for one trial, in bf16 and in 4 bit, with and without FSDP2."""
        return gpu_table(self.needs)

    @property
    def engine(self) -> list[str]:
        """Sentences on the engine to choose, for the base in bf16 and in 4 bit; empty without a base."""
        return engine_advice(self.needs)

    @property
    def total_parameters(self) -> int | None:
        """Number of parameters of the base, tied ones counted once, as in full fine-tuning; None without a base."""
        return None if self.base is None else count_parameters(self.base)

    @property
    def reduction_vs_full(self) -> float | None:
        """Reduction of trainable parameters against full fine-tuning: 1 - trainable / total; None without a base."""
        total = self.total_parameters
        return None if total is None else 1 - self.plan.trainable_parameters / total

    @property
    def uniform_rank(self) -> float:
        """Fractional rank of uniform on all sites with the same number of parameters."""
        return self.plan.trainable_parameters / uniform_cost(self.sites, 1)

    def required_base(self) -> PreTrainedModel:
        """Return the base.

        Raises:
            ConfigError: the plan was made from a profile alone.
        """
        if self.base is None:
            raise ConfigError("names of modules are checked against the base; required one: al.allocate(..., model=).")
        return self.base

    def to_dict(self) -> dict[str, Any]:
        """Return the plan with its totals as JSON-ready values."""
        return {
            **self.plan.to_dict(),
            "total_parameters": self.total_parameters,
            "reduction_vs_full": self.reduction_vs_full,
            "equals_uniform_rank": self.uniform_rank,
            "note": self.note,
            "not_adaptable": dict(self.architecture.left_out),
            "memory": None
            if self.memory is None
            else {
                **self.memory.estimate.to_dict(),
                "micro_batch": self.memory.micro_batch,
                "gradient_checkpointing": self.memory.checkpointing,
            },
            "gpus": list(self.gpus),
            "engine": self.engine,
        }

    def __str__(self) -> str:
        """Return table, remarks and totals, as `adaptive-lora plan` prints them."""
        return as_text(self)

    def __repr__(self) -> str:
        """Return method and totals; the model would be pages."""
        number = self.plan.trainable_parameters
        return f"<{type(self).__name__}: {self.plan.method}, {number:,} parameters, {len(self.sites)} sites>"

    def _repr_html_(self) -> str:
        """Return table, remarks and totals for a notebook."""
        return as_html(self)


def plan_method(
    config: StudyConfig,
    spec: MethodSpec,
    *,
    profile: ImportanceProfile | None = None,
    seed: int = 0,
    base: PreTrainedModel | None = None,
) -> PlanReport:
    """Plan a method on a base's architecture; no weights are read.

    Args:
        config: settings of the base and scaling, and of batches and precision for the memory estimate.
        spec: the method.
        profile: importance profile, for methods that follow one.
        seed: seed of the trial, for methods that draw at random.
        base: model to plan for; None: that of `config`.

    Raises:
        AdaptiveLoraError: the model or the allocation cannot be used.
    """
    base, base_name, head = _skeleton(config, spec) if base is None else _loaded(base)
    architecture = read_architecture(base)
    if profile is not None:
        _require_fit(profile, spec, architecture)
    train = config.train
    plan = make_plan(
        spec,
        architecture,
        alpha=train.alpha,
        scaling=train.scaling,
        profile=None if profile is None else profile.summary(),
        seed=seed,
    )
    if isinstance(plan, RankPlan):
        plan = _as_attached(plan, base, architecture, train.dropout)
    load = load_of(
        base,
        (*architecture.sites, *architecture.experts),
        plan,
        precision=resolve_precision(train.precision),
        longest=config.data.max_tokens,
        fused=train.batching != "padded",
        packed=train.batching != "padded",
        head=head,
    )
    storages = _storages(base, base_name, spec, architecture.sites)
    return PlanReport(
        plan=plan,
        spec=spec,
        head=head,
        architecture=architecture,
        base=base,
        base_name=base_name,
        load=load,
        memory=choose(load, train),
        needs=gpu_needs(replace(load, number_bytes=_BF16), storages, train),
    )


def _as_attached(plan: RankPlan, base: PreTrainedModel, architecture: Architecture, dropout: float) -> RankPlan:
    """Return a plan with the storage of a loaded base, checked to be one that PEFT attaches.

    Raises:
        ConfigError: PEFT adapts some sites by their weights, which do not take what the plan wants.
    """
    if not next(base.parameters()).is_meta:
        from adaptive_lora.methods.adapters.audit import as_stored  # PEFT takes seconds to load

        plan = as_stored(plan, base)
    if architecture.experts_note:
        from adaptive_lora.methods.adapters.attach import require_parameters

        require_parameters(base, plan, dropout)
    return plan


def _saved(base: PreTrainedModel) -> SavedQuantisation | None:
    """Return the quantisation in which the weights of a base are saved; None: they are not quantised."""
    settings = getattr(base, "config", None)
    return None if settings is None else quantisation_in(settings.to_dict())


def _storages(
    base: PreTrainedModel, base_name: str, spec: MethodSpec, sites: Sequence[AdapterSite]
) -> dict[str, Storage]:
    """Return the ways in which a method can store a base on a GPU, `bf16`, `nf4` or both, with their sizes."""
    saved = _saved(base)
    if saved is not None and saved.use == "nf4":
        kinds = ["nf4"]
    elif saved is not None or Path(base_name).is_file() or spec.options.needs_full_base:  # dequantised, GGUF, no 4 bit
        kinds = ["bf16"]
    else:
        kinds = ["bf16", "nf4"]
    return {kind: storage_of(base, sites, packed=kind == "nf4", number_bytes=_BF16) for kind in kinds}


def plan_profiled(config: StudyConfig, spec: MethodSpec, profile: ImportanceProfile, *, seed: int = 0) -> PlanReport:
    """Plan a method on the sites of a profile, without its model: no memory, and no number of all parameters.

    Args:
        config: alpha and scaling.
        spec: method that gives ranks.
        profile: importance profile with its sites.
        seed: seed of the trial, for methods that draw at random.

    Raises:
        AllocationError: the profile has no sites, or is of another metric, or the budget cannot be met.
    """
    if not profile.sites:
        raise AllocationError(
            "this profile does not say which sites it measured, because an earlier version wrote it; required model=, "
            "the model that was profiled or its name."
        )
    linear = tuple(site for site in profile.sites if not site.experts)
    experts = tuple(site for site in profile.sites if site.experts)
    architecture = Architecture(kind="", sites=linear, experts=experts)
    _require_fit(profile, spec, architecture)
    train = config.train
    plan = allocate(spec, profile.sites, alpha=train.alpha, scaling=train.scaling, profile=profile.summary(), seed=seed)
    return PlanReport(plan=plan, spec=spec, architecture=architecture)


def _skeleton(config: StudyConfig, spec: MethodSpec) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """Return the base of a study without weights, its name, and the modules that the task trains too."""
    task = config.data.task
    base = skeleton(config.model, task, [spec.base])
    head = find_head(base, ()) if task in TASKS and TASKS[task].head else ()
    return base, str(base_file(config.model) or config.model.model), head


def _loaded(base: PreTrainedModel) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """Return a loaded model, its name, and its modules that are trained in addition to adapters."""
    from adaptive_lora.methods.importance.own_batches import require_base

    require_base(base)
    return base, getattr(base, "name_or_path", "") or type(base).__name__, own_head(base)


def _require_fit(profile: ImportanceProfile, spec: MethodSpec, base: Architecture) -> None:
    """Raise AllocationError for a profile of another metric or model than a plan's."""
    metric = spec.options.metric
    if metric not in (None, profile.metric):
        raise AllocationError(
            f"{spec.label} follows {metric}, but the profile given measured {profile.metric}; give "
            f"a profile of {metric}, or the method metric={profile.metric} where it takes that."
        )
    sites = (*base.sites, *base.experts) if spec.experts else base.sites
    lacking = [site.name for site in sites if site.name not in profile.scores]
    if lacking:
        raise AllocationError(
            f"the profile has no score for {len(lacking)} of {len(sites)} sites, such as "
            f"{lacking[0]}; required one of this model, from `adaptive-lora profile`."
        )
    if strange := sorted(profile.scores.keys() - {site.name for site in (*base.sites, *base.experts)}):
        raise AllocationError(
            f"the profile has scores for {len(strange)} sites that this model lacks, such as {strange[0]}; required "
            "one of this model, from `adaptive-lora profile`."
        )
    sizes = {site.name: (site.in_features, site.out_features) for site in profile.sites}
    for site in sites:
        here = site.in_features, site.out_features
        if (there := sizes.get(site.name, here)) != here:
            raise AllocationError(
                f"the profile measured {site.name} with {there[0]} inputs and {there[1]} outputs, this model has "
                f"{here[0]} and {here[1]}; required one of this model, from `adaptive-lora profile`."
            )
