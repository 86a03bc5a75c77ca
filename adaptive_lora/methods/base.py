"""The contract of a method: its options, its plan (numbers only), and how the plan is trained.

A method is one frozen dataclass. Its fields are its options; label, help text, row of the docs and contract tests
follow from the class. To add one, write its file in this package: `catalogue.METHODS` finds it by its `name`.
Planning imports no torch; what needs it is imported when a method is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.plan import RankPlan, SiteRank
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.allocation.spec import MethodSpec
from adaptive_lora.allocation.tuner_plan import Plan, TunerPlan
from adaptive_lora.results import TrainResult


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEvent:
    """The ranks from an optimiser step on."""

    step: int
    ranks: dict[str, int]
    """Site name -> rank; 0 where a site has lost all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTrial:
    """The trained model of a trial, on the base, ready to be tested and saved."""

    model: Any
    """PEFT model, or `AdaptedModel` of a custom tuner."""
    plan: Plan
    """Plan of the model; ranks are those of the start where training does not change them."""
    result: TrainResult
    """Result of the training that gave the model's weights."""
    training_parameters: int
    """Most parameters that were trained at once, at any time."""
    history: tuple[RankEvent, ...] = ()
    """Ranks during training, where they change."""
    search_seconds: float = 0.0
    """Wall time spent on finding ranks and initial weights, in seconds, trainings included."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further metrics of the method by name."""


class TrialContext(Protocol):
    """One trial as its method sees it. At most one adapter is on the base at a time."""

    @property
    def method(self) -> MethodSpec:
        """Method with the options that all methods have."""

    @property
    def seed(self) -> int:
        """Seed of the trial."""

    @property
    def dropout(self) -> float:
        """Share of LoRA's inputs that is dropped in training."""

    @property
    def steps(self) -> int:
        """Optimiser steps of one training."""

    @property
    def plan(self) -> RankPlan:
        """Ranks before training, or the budget that training must end at."""

    @property
    def tuner_plan(self) -> TunerPlan:
        """Plan of a method that gives no ranks."""

    @property
    def base(self) -> Any:
        """Frozen base, a model of transformers."""

    @property
    def head(self) -> tuple[str, ...]:
        """Modules of the task that are trained beside the method's parameters."""

    @property
    def context(self) -> Any:
        """Base, data, task and runtime that the trial runs on."""

    def calibration(self) -> list[Any]:
        """Return the calibration batches of the seed, from the training part."""

    def profile_task(self) -> Any:
        """Return what importance is measured on for the seed and fold."""

    def initial_a(self, entry: SiteRank) -> Any:
        """Return the A of shape (rank, in) that `attach` gives a site."""

    def attach(self, plan: RankPlan, *, head_as_trained: bool = False) -> Any:
        """Return a PEFT model with a plan's adapters and the seed's initial weights, audited as built."""

    def adopt(self, adapted: Any, undo: Callable[[Any], None] = ...) -> Any:
        """Take over an adapted base, on the trial's device, until it is released."""

    def release(self) -> None:
        """Give the base back as it was."""

    def train(self, adapted: Any, callback: Any = None, *, trainings: int = 1) -> TrainResult:
        """Train the adopted model on the trial's training part, from its last checkpoint on."""

    def validation_loss(self, model: object) -> float:
        """Return a model's loss on the validation part, in nats per supervised token."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to spend trainable parameters; subclass `RankMethod` or `TunerMethod`."""

    name: ClassVar[str]
    """Name on the command line and in study files."""
    gives_ranks: ClassVar[bool]
    """Whether it plans ranks of LoRA, or the tensors of another tuner."""
    ranks_in_training: ClassVar[bool] = False
    """Whether its final ranks are found in training, or on the base before it, and not by its plan."""
    holds_limits: ClassVar[bool] = True
    """Whether it keeps limits of ranks (`min_rank`, `max_rank`, caps, `multiple`)."""
    is_control: ClassVar[bool] = False
    """Whether it wraps another method, to tell what that method's knowledge is worth."""
    trainings: ClassVar[int] = 1
    """Whole trainings that it takes one after another."""
    scaling_in_training: ClassVar[str] = ""
    """What happens to LoRA's factor in training, in sentences; empty: it is the policy's throughout."""
    refused_variants: ClassVar[Mapping[str, str]] = {}
    """Option of a variant that it cannot have -> the reason."""

    @property
    def metric(self) -> str | None:
        """Name of the importance profile that it follows, or None."""
        return None

    @property
    def wrapped(self) -> RankMethod | None:
        """Method that a control arm wraps; None for other methods."""
        return None

    @property
    def is_plain_lora(self) -> bool:
        """Whether its plan is trained as it is, as plain LoRA: such trials can be trained together."""
        return False

    def label_under(self, budget: str | None) -> str:
        """Return the short form of its options for run names, such as `r16-4`.

        Args:
            budget: of the method, as given; an option that the budget sets is left out.
        """
        raise NotImplementedError

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Attach, train and finish.

        The model stays on the base, built as `TrainedTrial.plan` says; whoever called tests, saves and releases it.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RankMethod(Method):
    """A method that gives every adapter site a rank; it implements `demand` or `solve`."""

    gives_ranks: ClassVar[bool] = True

    @property
    def rank_label(self) -> str:
        """Short form of its options for run names, such as `r16-4`."""
        raise NotImplementedError

    def label_under(self, budget: str | None) -> str:
        """Return the short form of its options, which no budget sets."""
        return self.rank_label

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the ranks wanted for sites, before integers and budgets.

        Args:
            sites: sorted by layer and name.
            profile: what was measured about them, where `metric` names a profile.
        """
        raise NotImplementedError

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return integer ranks within a problem's limits and budget; without a rule of its own, those of `demand`."""
        return problem.granted(self.demand(problem.sites, problem.profile))

    def check(self, plan: RankPlan) -> None:
        """Check that what training starts from fits, too.

        Raises:
            AllocationError: it does not.
        """

    @property
    def is_plain_lora(self) -> bool:
        """Whether its plan is trained as it is: where `fit` is that of this class."""
        return type(self).fit is RankMethod.fit

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train the plan as it is: plain LoRA."""
        from adaptive_lora.methods.adapters import audit_moved

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

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the plan for a base.

        Args:
            base: its tensors and sizes.
            budget: most trainable parameters, or None.
            method: label of the method.

        Raises:
            AllocationError: the base does not have what is trained, or the budget is too small.
        """
        raise NotImplementedError


_RECIPES = {"own_family": "full", "peft_family": "ia3"}
"""Earlier name of a way to train -> method that trains so."""


def adopted(kind: Any) -> type[Method]:
    """Return an options class of another package as a method, whether it subclasses `Method` or not.

    Plug-ins of earlier versions are plain dataclasses, which name by `recipe` the method whose training they share.
    """
    if issubclass(kind, Method):
        own: type[Method] = kind
        return own
    base: type[Method] = TunerMethod if hasattr(kind, "design") else RankMethod

    def fit(self: Any, trial: TrialContext) -> TrainedTrial:
        recipe = str(getattr(self, "recipe", "lora"))
        owner: Any = RankMethod if recipe == "lora" else METHODS[_RECIPES.get(recipe, recipe)]
        trained: TrainedTrial = owner.fit(self, trial)
        return trained

    plain = property(lambda self: getattr(self, "recipe", "lora") == "lora" and self.gives_ranks)
    found = {"fit": fit, "is_plain_lora": plain}
    if not hasattr(kind, "ranks_in_training"):
        found["ranks_in_training"] = hasattr(kind, "recipe")
        found["holds_limits"] = getattr(kind, "holds_limits", not found["ranks_in_training"])
    return type(kind.__name__, (kind, base), {**found, "__doc__": kind.__doc__, "__module__": kind.__module__})
