"""Results of a comparison as frozen values: everything that the report, tables and JSON show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adaptive_lora.analysis.comparison.findings import (
    Agreement,
    AuditEntry,
    AuditKind,
    BudgetMap,
    EarlyRate,
    Forgetting,
    FrontArea,
    Headroom,
    Ladder,
    ParetoFront,
    PowerAnswer,
    RetainedSource,
    VerdictKind,
)
from adaptive_lora.analysis.comparison.looks import Look
from adaptive_lora.analysis.comparison.outcome import Margin, Outcome, Replicate
from adaptive_lora.analysis.stats import Components, Effect, Interval

NO_WINNER = "none"
"""Winner of a comparison in which every method may forget more than is allowed."""
MATCHED_SHARE = 0.01
"""Parameter counts that differ by a smaller share are one budget, filled as whole ranks allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome for one method, and a sentence with its numbers."""

    kind: VerdictKind
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedMean:
    """Mean and standard deviation over seeds (n - 1), or the reason why there is none."""

    mean: float | None
    sd: float | None
    seeds: int
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """One learning rate of one method; folds are averaged within a seed."""

    lr: float | None
    """None where it is not known."""
    validation: SeedMean
    """Validation loss in the unit of the outcome, by which the rate is chosen."""
    test: SeedMean
    """Outcome on the test part; the choice never looks at it."""
    chosen: bool
    raced: str = ""
    """Reason why a race stopped the rate; '' where its trials were trained to the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Trainable parameters of a method, exact."""

    mean: float | None
    """Mean over seeds; a measured allocation may differ between seeds. None: no finished trial, or not recorded."""
    least: int | None
    most: int | None
    difference: float
    """Difference to the baseline's mean; negative is fewer; 0 where one of both is not known."""
    share: float | None
    """`difference` over the baseline's parameters; None where the baseline has none, or one of both is not known."""

    @property
    def known(self) -> bool:
        """Knowledge of both counts; without it nothing is said about equal parameters."""
        return self.mean is not None and (self.share is not None or self.difference != 0)

    @property
    def matched(self) -> bool:
        """Equality of the counts but for the rest of a budget that whole ranks leave."""
        return self.share is not None and abs(self.share) < MATCHED_SHARE

    @property
    def fewer(self) -> bool:
        """Mark of a method that really saves parameters."""
        return self.difference < 0 and not self.matched

    @property
    def more(self) -> bool:
        """Mark of a method that may win by its parameters alone."""
        return self.difference > 0 and not self.matched


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A trial that gave no scores."""

    run_id: str
    method: str
    seed: int
    fold: int
    lr: float | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tests:
    """P-values of one difference; None where the number does not exist (all seeds equal, one seed)."""

    sign_flip: float
    """P over all sign flips; the verdict rests on it."""
    attainable: float
    """Least two-sided p at this number of seeds, before any correction."""
    holm: float
    """`sign_flip` corrected for all compared methods."""
    benjamini_hochberg: float
    max_t: float | None
    """`sign_flip` corrected by step-down max-T over joint flips of all methods; None with several looks."""
    wilcoxon: float | None
    paired_t: float | None
    normality: float | None
    """P of Shapiro and Wilk's test: small speaks against the t test."""
    symmetry: float | None
    """P of D'Agostino's test, from 8 seeds: small speaks against Wilcoxon's test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginTests:
    """One-sided tests against the margin; not corrected for several methods.

    A verdict needs both: a p at or below the level, and an interval that agrees.
    """

    interval: Interval
    """Interval of the mean difference at 1 - 2 x level (90 % for 5 %), by the method of the other.
    Two one-sided tests show the same: equivalent if it lies within the margin, non-inferior if its
    upper end does."""

    noninferior: float
    """P of "worse by at least the margin", by sign flips."""
    equivalent: float
    """P of "differs by at least the margin", by sign flips (TOST)."""
    equivalent_t: float | None
    """P of "differs by at least the margin", by Student's t; None with several looks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleChange:
    """Difference of one test example's loss to the baseline's, averaged over seeds."""

    example_id: str
    difference: float
    """Nats summed over the response; negative is better than the baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Method minus baseline in the outcome, paired by seed, or by example where there is one run per method."""

    lr: float | None
    baseline_lr: float | None
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """One difference per seed, in the order of `seeds`."""
    replicates: int
    """Number of paired seeds, or of paired examples, that standard deviation, interval and tests are over."""
    mean: float
    sd: float | None
    interval: Interval
    """Interval for other seeds and the same examples; of one run per method, for other examples and the same run."""
    hierarchical: Interval
    """Interval for other seeds and other examples of the same kind."""
    effect: Effect
    tests: Tests
    margin_tests: MarginTests | None
    components: Components | None
    """Variance between seeds, examples and both; None below 2 seeds."""
    power: tuple[PowerAnswer, ...] = ()
    """Seeds and examples needed; only where the verdict is inconclusive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreDifference:
    """Method minus baseline in exact match, paired by seed; positive is better."""

    mean: float
    interval: Interval
    """Interval for other seeds and the same examples."""
    hierarchical: Interval
    """Interval for other seeds and other examples of the same kind."""
    superiority: float
    """Share of seeds in which the method has more exact matches, ties counted half."""
    sign_flip: float
    holm: float
    """`sign_flip` corrected for all compared methods. The verdict rests on the loss alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSummary:
    """Results of one method, at its own best learning rate."""

    label: str
    lr: float | None
    """Learning rate chosen on mean validation loss; None where every trial failed, or where it is not known."""
    rates: tuple[LearningRate, ...]
    seeds: tuple[int, ...]
    missing_seeds: tuple[int, ...]
    """Seeds of the study without a complete set of finished folds at the chosen rate."""
    failures: tuple[Failure, ...]
    """Failed trials at any learning rate."""
    loss: SeedMean
    """The outcome: test loss, or the score that `Comparison.outcome` names."""
    loss_interval: Interval
    perplexity: SeedMean
    token_accuracy: SeedMean
    exact_match: SeedMean
    further: Mapping[str, SeedMean]
    """Other scores of the task by name, such as `f1`."""
    parameters: Parameters
    reduction_vs_full: SeedMean
    efficiency_ratio: SeedMean
    tokens_per_second: SeedMean
    train_seconds: SeedMean
    peak_memory_bytes: SeedMean
    trained_parameters: SeedMean
    """Parameters while training; `parameters` are those that are served."""
    profile_stability: SeedMean
    """Spearman correlation between importance from two halves of the calibration batches."""
    covering_rank: SeedMean
    """Least uniform rank that covers every component above the noise edge of the profile."""
    early_rate: EarlyRate | None
    """Tokens to the baseline's final validation loss; None where no curves were recorded."""
    difference: Difference | None
    """Difference of best against best rate; None for the baseline and where nothing can be paired."""
    shared_rate: Difference | None
    """Difference at the baseline's rate; None where the method was not trained to the end there."""
    exact_match_difference: ScoreDifference | None
    most_changed: tuple[ExampleChange, ...]
    """Examples most improved, then most worsened; empty where seeds have different test parts."""
    verdict: Verdict
    forgetting: Mapping[str, Forgetting] = dataclasses.field(default_factory=dict)
    """Name of retained data -> what was forgotten of it; empty without retained data."""
    barred: str = ""
    """Reason why the method cannot be champion: it may forget more than is allowed; empty otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """One method on one of several tasks."""

    task: str
    method: str
    outcome: Outcome
    score: SeedMean
    baseline: SeedMean
    difference: Difference
    p_corrected: float
    """Deciding p, corrected for all tasks and methods together."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer of a study."""

    answer: str
    """The verdict in one sentence."""
    remarks: tuple[str, ...]
    """Remarks that belong to the answer, such as worse methods and unequal parameters."""
    audit: tuple[AuditEntry, ...]
    """Every check of fairness with its outcome; bad ones are shown in red above all results."""
    notes: tuple[str, ...]
    """Limits of the numbers, such as too few seeds for any p under 0.05."""
    baseline: str
    winner: str
    """Label of the method whose adapter becomes champion, or `none`; the rule is in `choose_winner`."""
    decision: str
    """Reason why it is the winner."""
    methods: tuple[MethodSummary, ...]
    """Baseline first, then in the order of the records."""
    margin: Margin
    frozen_loss: float | None
    """Test loss of the base model without adapter."""
    confidence: float
    correction: str
    """Which corrected p decides: `holm`, `max_t` or `benjamini_hochberg`."""
    trials: int
    failed_trials: int
    raced_rates: int
    """Learning rates of all methods that a race stopped."""
    fronts: tuple[ParetoFront, ...]
    """Loss against trained and served parameters, training time and memory, where recorded."""
    areas: tuple[FrontArea, ...]
    """Area under the front of each family of methods, the baseline's family first."""
    agreements: tuple[Agreement, ...]
    """Correlations of allocations across seeds, methods, metrics and tasks; empty where nothing varies."""
    budgets: tuple[BudgetMap, ...]
    """Shares of each method's parameters, by layer and role."""
    unit: str
    """Unit of the losses, such as `nats per token`."""
    outcome: Outcome
    """Name, unit and direction of the number that is compared, which fields call `loss`."""
    over: Replicate
    """Unit of inference: seeds, or test examples where there is one run per method."""
    tasks: tuple[TaskResult, ...]
    """One row per task and method, where the outcome is a mean over tasks."""
    facts: Mapping[str, str]
    """Facts that reproduce it: study, store, base, data, precision, versions, command, settings."""
    ladder: Ladder | None = None
    """Bound on what an allocation could win; None where the study has no ladder."""
    headroom: Headroom | None = None
    """Gain of the planted ranks, and what each method recovers of it; None where no ranks were planted."""
    looks: tuple[Look, ...] = ()
    """Looks of a study whose seeds were added until it was decided; empty where all were planned at once."""
    retained: tuple[RetainedSource, ...] = ()
    """Data on which forgetting was measured; empty without `retain_data`."""

    @property
    def alpha(self) -> float:
        """Level of the tests: 1 - confidence."""
        return round(1 - self.confidence, 12)

    @property
    def fairness(self) -> tuple[str, ...]:
        """Findings that make the comparison less than fair; empty where nothing does."""
        return tuple(entry.text for entry in self.audit if entry.kind is AuditKind.BAD)

    def deciding_p(self, difference: Difference) -> float:
        """Return the corrected p that decides."""
        return float(getattr(difference.tests, self.correction))

    @property
    def headline(self) -> str:
        """Sentences shown before everything else: that of the headroom, the answer and its remarks."""
        return " ".join((*([self.headroom.text] if self.headroom else ()), self.answer, *self.remarks))

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Label -> place of its method in `methods`."""
        return {method.label: place for place, method in enumerate(self.methods)}

    def method(self, label: str) -> MethodSummary:
        """Return the summary of a method by its label."""
        return self.methods[self.places[label]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values: no NaN, no infinity; a note accompanies each None.

        Keys about retained data, looks, a ladder and headroom are there only where a study has them.
        """
        values = {"headline": self.headline, "fairness": list(self.fairness), **jsonable(self)}
        for name in ("ladder", "headroom"):
            if getattr(self, name) is None:
                del values[name]
        if not self.looks:
            del values["looks"]
        if not self.retained:
            del values["retained"]
            for method in values["methods"]:
                del method["forgetting"], method["barred"]
        return values


def jsonable(record: Any) -> dict[str, Any]:
    """Return a dataclass as JSON reads it back; a ValueError refuses numbers that JSON does not have."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    return values
