"""`plan`: the plan of a method on a base, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import MethodSpec, Plan, RankPlan, make_plan, uniform_cost
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.base_file import base_file
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.audit import as_stored
from adaptive_lora.methods.importance.own_batches import require_base
from adaptive_lora.models.base import count_parameters, skeleton
from adaptive_lora.models.device import resolve_precision
from adaptive_lora.models.heads import find_head, own_head
from adaptive_lora.models.sites import read_architecture, site_notes
from adaptive_lora.runner.emit import Emitted, emit
from adaptive_lora.serving import TASKS, quantisation_in
from adaptive_lora.training.memory import Load, MemoryChoice, choose, load_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adaptive_lora.methods.importance import ImportanceProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """A plan, with the sizes to compare it with."""

    plan: Plan
    spec: MethodSpec
    architecture: Architecture
    """Sites of the base, adapted or not, and its other tensors and sizes."""
    base: PreTrainedModel
    """The model on the meta device, without weights."""
    base_name: str
    load: Load
    """Sizes of its training that determine the memory."""
    memory: MemoryChoice
    """Settings that keep its training within the memory limit."""
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
        settings = getattr(self.base, "config", None)
        saved = None if settings is None else quantisation_in(settings.to_dict())
        if saved is not None and saved.use == "dequantised" and next(self.base.parameters()).is_meta:
            notes.append(f"The base is saved in {saved.name}; training uses the dequantised weights.")
        notes += site_notes(self.base, self.architecture)
        return " ".join(filter(None, notes)) or None

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the base, with tied ones counted once, as trained by full fine-tuning."""
        return count_parameters(self.base)

    @property
    def reduction_vs_full(self) -> float:
        """Reduction of trainable parameters against full fine-tuning: 1 - trainable / total."""
        return 1 - self.plan.trainable_parameters / self.total_parameters

    @property
    def uniform_rank(self) -> float:
        """Fractional rank of uniform on all sites with the same number of parameters."""
        return self.plan.trainable_parameters / uniform_cost(self.sites, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan with its totals as JSON-ready values."""
        return {
            **self.plan.to_dict(),
            "total_parameters": self.total_parameters,
            "reduction_vs_full": self.reduction_vs_full,
            "equals_uniform_rank": self.uniform_rank,
            "note": self.note,
            "not_adaptable": dict(self.architecture.left_out),
            "memory": {
                **self.memory.estimate.to_dict(),
                "micro_batch": self.memory.micro_batch,
                "gradient_checkpointing": self.memory.checkpointing,
            },
        }


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
        _require_fit(profile, spec, architecture.sites)
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
        plan = as_stored(plan, base)
    load = load_of(
        base,
        architecture.sites,
        plan,
        precision=resolve_precision(train.precision),
        longest=config.data.max_tokens,
        fused=train.batching != "padded",
        packed=train.batching != "padded",
        head=head,
    )
    return PlanReport(
        plan=plan,
        spec=spec,
        head=head,
        architecture=architecture,
        base=base,
        base_name=base_name,
        load=load,
        memory=choose(load, train),
    )


def _skeleton(config: StudyConfig, spec: MethodSpec) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """Return the base of a study without weights, its name, and the modules that the task trains too."""
    task = config.data.task
    base = skeleton(config.model, task, [spec.base])
    head = find_head(base, ()) if task in TASKS and TASKS[task].head else ()
    return base, str(base_file(config.model) or config.model.model), head


def _loaded(base: PreTrainedModel) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """Return a loaded model, its name, and its modules that are trained in addition to adapters."""
    require_base(base)
    return base, getattr(base, "name_or_path", "") or type(base).__name__, own_head(base)


def _require_fit(profile: ImportanceProfile, spec: MethodSpec, sites: Sequence[AdapterSite]) -> None:
    """Raise AllocationError for a profile of another metric or model than a plan's."""
    metric = spec.options.metric
    if metric not in (None, profile.metric):
        raise AllocationError(
            f"{spec.label} follows {metric}, but the profile given measured {profile.metric}; give "
            f"a profile of {metric}, or the method metric={profile.metric} where it takes that."
        )
    lacking = [site.name for site in sites if site.name not in profile.scores]
    if lacking:
        raise AllocationError(
            f"the profile has no score for {len(lacking)} of {len(sites)} sites, such as "
            f"{lacking[0]}; required one of this model, from `adaptive-lora profile`."
        )
