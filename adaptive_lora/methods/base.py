"""The contract of a method: its options, its plan (numbers only), and how the plan is trained.

A method is one frozen dataclass. Its fields are its options; label, help text, row of the docs and contract tests
follow from the class. To add one, write its file in this package: `catalogue.METHODS` finds it by its `name`.
Planning imports no torch; what needs it is imported when a method is fitted.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.plan import RankPlan, SiteRank
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.allocation.spec import MethodSpec
from adaptive_lora.allocation.start import Start
from adaptive_lora.allocation.tuner_plan import Plan, TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.results import TrainResult

if TYPE_CHECKING:
    import torch


class TrainerCallback:
    """Called by the training loop: actions of a method in addition to the gradient step.

    Methods that decide ranks in training (AdaLoRA, grow and prune) change the model here. `state` holds what they need
    to continue after an interruption. This class does nothing, as plain LoRA needs.
    """

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Receive the optimiser and the number of optimiser steps, before the first step."""

    def penalty(self) -> torch.Tensor | None:
        """Return a term added to the objective of a step, or None; reported losses exclude it."""
        return None

    def stepped(self, step: int, *, taken: bool) -> None:
        """Act after an optimiser step, before its gradients are cleared.

        Args:
            step: number of optimiser steps so far, from 1; micro-batches do not count.
            taken: False where the guard skipped the step; its gradients are then invalid.
        """

    def settled(self, step: int) -> bool:
        """Return whether the model has its final ranks; only then can its weights be kept as the best."""
        return True

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which `restore` continues."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a value of `state`; parameters get the shapes that they had then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEvent:
    """Ranks in force from an optimiser step on."""

    step: int
    ranks: dict[str, int]
    """Site name -> rank; 0 for a site without remaining components."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTrial:
    """The trained model of a trial, on the base, ready to be tested and saved."""

    model: Any
    """PEFT model, or `AdaptedModel` of a custom tuner."""
    plan: Plan
    """Plan of the model, with its final ranks."""
    result: TrainResult
    """Result of the training that gave the model's weights."""
    training_parameters: int
    """Maximum number of parameters trained at the same time."""
    history: tuple[RankEvent, ...] = ()
    """Ranks during training, where they change."""
    search_seconds: float = 0.0
    """Wall time in seconds spent on finding ranks and initial weights, including trainings."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further metrics of the method by name."""


class TrialContext(Protocol):
    """One trial as its method sees it. At most one adapter is on the base at a time."""

    @property
    def method(self) -> MethodSpec:
        """Method specification, with the options that all methods share."""

    @property
    def seed(self) -> int:
        """Seed of the trial."""

    @property
    def dropout(self) -> float:
        """Dropout probability of LoRA's inputs in training."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps of one training."""

    @property
    def plan(self) -> RankPlan:
        """Rank plan before training; its parameters are the budget of the final adapter."""

    @property
    def tuner_plan(self) -> TunerPlan:
        """Plan of a method that gives no ranks."""

    @property
    def base(self) -> Any:
        """Frozen base, a model of transformers."""

    @property
    def head(self) -> tuple[str, ...]:
        """Modules of the task trained in addition to the method's parameters."""

    @property
    def context(self) -> Any:
        """Base, data, task and runtime of the trial."""

    def calibration(self) -> list[Any]:
        """Return the calibration batches of the seed, from the training split."""

    def profile_task(self) -> Any:
        """Return the inputs of importance profilers for the seed and fold."""

    def profile(self, metric: str) -> Any:
        """Return the `ImportanceProfile` of the seed and fold by a metric, which the study's trials share."""

    def initial_a(self, entry: SiteRank) -> Any:
        """Return a site's initial A in `attach`, shape (rank, in)."""

    def attach(self, plan: RankPlan, *, head_as_trained: bool = False) -> Any:
        """Return a PEFT model with a plan's adapters and the seed's initial weights, audited as built."""

    def adopt(self, adapted: Any, undo: Callable[[Any], None] = ...) -> Any:
        """Register an adapted base, on the trial's device, until it is released."""

    def release(self) -> None:
        """Restore the base."""

    def train(self, adapted: Any, callback: TrainerCallback | None = None, *, trainings: int = 1) -> TrainResult:
        """Train the adopted model on the trial's training split, from its last checkpoint on."""

    def validation_loss(self, model: object) -> float:
        """Return a model's loss on the validation split, in nats per supervised token."""

    def probe(self, model: object) -> torch.Tensor:
        """Return a model's outputs for the first training examples, shape (up to 4, ...), float32."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to allocate trainable parameters; subclass `RankMethod` or `TunerMethod`."""

    name: ClassVar[str]
    """Name on the command line and in study files."""
    gives_ranks: ClassVar[bool]
    """Kind of its plans: LoRA ranks if true, else the tensors of another tuner."""
    ranks_in_training: ClassVar[bool] = False
    """Origin of its final ranks: training, or a pass over the base before it, if true; else its plan."""
    holds_limits: ClassVar[bool] = True
    """Support of rank limits (`min_rank`, `max_rank`, caps, `multiple`)."""
    least_rank: ClassVar[int | None] = None
    """Value of `min_rank` where it is not given; None: that of all methods."""
    takes: ClassVar[frozenset[str] | None] = None
    """Names of the shared options that it takes; None: all."""
    is_control: ClassVar[bool] = False
    """Mark of a control arm, which wraps another method and removes one of its effects."""
    wraps: ClassVar[bool] = False
    """Support of another method as its option `of`, whose options it then takes."""
    further: ClassVar[str | None] = None
    """Name of the field that takes options known to another package alone, as (name, text) pairs, or None."""
    trainings: ClassVar[int] = 1
    """Number of full trainings that it runs in sequence."""
    scaling_in_training: ClassVar[str] = ""
    """Sentences on changes of LoRA's factor in training; empty: it is always the policy's."""
    divided_base: ClassVar[bool] = False
    """Support of a base divided over processes (FSDP2): true if it uses the base's weights in forward passes only."""
    refused_variants: ClassVar[Mapping[str, str]] = {}
    """Option of an unsupported variant -> the reason."""

    @property
    def needs_full_base(self) -> str:
        """Reason why it cannot train over a base in 4 bit; empty: it can."""
        return ""

    @property
    def metric(self) -> str | None:
        """Name of the importance profile that it follows, or None."""
        return None

    @property
    def further_packages(self) -> tuple[str | None, ...]:
        """Other packages that provide parts of it, as `name==version`."""
        return ()

    @property
    def wrapped(self) -> RankMethod | None:
        """Method given as the option `of`; None without one."""
        return None

    @property
    def is_plain_lora(self) -> bool:
        """Mark of a plan that is trained unchanged as plain LoRA, so that its trials can be trained together."""
        return False

    def label_under(self, budget: str | None) -> str:
        """Return the short form of its options for run names, such as `r16-4`.

        Args:
            budget: budget of the method, as given; an option determined by the budget is left out.
        """
        raise NotImplementedError

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Attach, train and finish.

        The model stays on the base, built by `TrainedTrial.plan`; the caller tests, saves and releases it.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RankMethod(Method):
    """A method that gives every adapter site a rank; it implements `demand` or `solve`."""

    gives_ranks: ClassVar[bool] = True
    divided_base: ClassVar[bool] = True

    @property
    def rank_label(self) -> str:
        """Short form of its options for run names: `r16`, then the options with a `label` that are not the default."""
        changed = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        parts = [str(field.metadata.get("label", "")).format(getattr(self, field.name)) for field in changed]
        return "-".join([f"r{vars(self)['rank']}", *filter(None, parts)])

    def label_under(self, budget: str | None) -> str:
        """Return the short form of its options, which do not depend on a budget."""
        return self.rank_label

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the ranks requested for sites, before rounding and budget.

        Args:
            sites: sites, sorted by layer and name.
            profile: measured importance, where `metric` names a profile.
        """
        raise NotImplementedError

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return integer ranks within a problem's limits and budget; by default those requested by `demand`."""
        return problem.granted(self.demand(problem.sites, problem.profile))

    def check(self, plan: RankPlan) -> None:
        """Check the starting plan of training, too.

        Raises:
            AllocationError: the starting plan does not fit.
        """

    @property
    def is_plain_lora(self) -> bool:
        """Mark of a plan that is trained unchanged: true if `fit` is that of this class."""
        return type(self).fit is RankMethod.fit

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train the plan unchanged, as plain LoRA, from the initial weights of `init`."""
        from adaptive_lora.methods.adapters import audit_moved

        if trial.plan.init is not Start.DEFAULT:
            from adaptive_lora.methods.start import fit_from_start

            return fit_from_start(trial)
        adapted = trial.attach(trial.plan)
        result = trial.train(adapted)
        audit_moved(adapted)
        return TrainedTrial(
            model=adapted, plan=trial.plan, result=result, training_parameters=trial.plan.trainable_parameters
        )


@dataclass(frozen=True, kw_only=True)
class TunerMethod(Method):
    """A method that gives no ranks: prompts, bottlenecks, rescaling, weights of the base."""

    gives_ranks: ClassVar[bool] = False
    takes: ClassVar[frozenset[str] | None] = frozenset({"budget"})

    @property
    def needs_full_base(self) -> str:
        """Reason why it cannot train over a base in 4 bit."""
        return "no method without ranks but peft trains over a base in 4 bit"

    def label_under(self, budget: str | None) -> str:
        """Return the short form of its options; empty, because there are none."""
        return ""

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the plan for a base.

        Args:
            base: tensors and sizes of the base.
            budget: maximum number of trainable parameters, or None.
            method: label of the method.

        Raises:
            AllocationError: the base lacks the tensors to train, or the budget is too small.
        """
        raise NotImplementedError

    def plan(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the plan of `design`, checked against the budget; what is left of that is noted.

        Raises:
            AllocationError: the plan costs more than the budget, or `design` refuses.
        """
        plan = self.design(base, budget, method)
        used = plan.trainable_parameters
        if budget is None or used == budget:
            return plan
        if used > budget:
            raise AllocationError(
                f"{method} trains {used:,} parameters, above the budget of {budget:,}; raise the budget, or leave "
                "it out."
            )
        if dataclasses.fields(self):
            return plan
        note = f"{method} has no size parameter: of {budget:,} parameters it uses {used:,}, the nearest below."
        return dataclasses.replace(plan, notes=(*plan.notes, note))

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train the planned tensors."""
        from adaptive_lora.methods.adapters.tuners import fit_tuner

        return fit_tuner(trial)


def largest(cost: Callable[[int], int], budget: int, what: str) -> int:
    """Return the largest value of a size parameter, from 1, that is within a budget.

    Args:
        cost: function from a value to its number of parameters; each unit costs at least one.
        budget: maximum number of parameters.
        what: noun for the value in messages, such as `virtual token`.

    Raises:
        AllocationError: the value 1 already costs more than the budget.
    """
    found = bisect_right(range(1, budget + 1), budget, key=cost)
    if not found:
        raise AllocationError(f"budget of {budget:,} parameters is too small: one {what} already costs {cost(1):,}.")
    return found


_RECIPES: Mapping[str, Any] = {"lora": RankMethod, "own_family": TunerMethod, "peft_family": TunerMethod}
"""Earlier name of a training -> class with this training."""


def adopted(kind: Any) -> type[Method]:
    """Return an options class of another package as a method, also if it does not subclass `Method`.

    Plug-ins of earlier versions are plain dataclasses whose `recipe` names the method whose training they share.
    """
    if issubclass(kind, Method):
        own: type[Method] = kind
        return own
    base: type[Method] = TunerMethod if hasattr(kind, "design") else RankMethod

    def fit(self: Any, trial: TrialContext) -> TrainedTrial:
        recipe = str(getattr(self, "recipe", "lora"))
        trained: TrainedTrial = (_RECIPES.get(recipe) or METHODS[recipe]).fit(self, trial)
        return trained

    plain = property(lambda self: getattr(self, "recipe", "lora") == "lora" and self.gives_ranks)
    found = {"fit": fit, "is_plain_lora": plain}
    if not hasattr(kind, "ranks_in_training"):
        found["ranks_in_training"] = hasattr(kind, "recipe")
        found["holds_limits"] = getattr(kind, "holds_limits", not found["ranks_in_training"])
    return type(kind.__name__, (kind, base), {**found, "__doc__": kind.__doc__, "__module__": kind.__module__})
