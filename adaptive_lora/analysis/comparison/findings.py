"""Results of a comparison: kinds of verdicts, audit, power, efficiency, agreement, allocation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from adaptive_lora.analysis.stats import Interval


class VerdictKind(StrEnum):
    """Verdict on a method against the baseline; its value is shown to people."""

    BASELINE = "baseline"
    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    NON_INFERIOR = "non-inferior with fewer parameters"
    INCONCLUSIVE = "no difference shown"
    NOT_COMPARED = "not compared"


class AuditKind(StrEnum):
    """Outcome of one check; `BAD` is shown in red above all results."""

    OK = "ok"
    BAD = "bad"
    UNKNOWN = "unknown"
    """The trials did not record what the check looks at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """One finding of the fairness audit; every topic has at least one."""

    topic: str
    """Subject of the check, such as `parameters`, `data order`, `tuning`, `scaling`, `failures`."""
    kind: AuditKind
    text: str
    """A sentence with its numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerAnswer:
    """Seeds and examples that show one difference, by the paired t test at the corrected level."""

    about: str
    """Difference asked about: `observed`, of the observed size, or `margin`, as large as the margin."""
    difference: float
    """Absolute difference in the unit of the outcome."""
    seeds: int
    """Number of seeds at hand."""
    examples: int
    """Test examples at hand, per seed; 0 where no scores of single examples are known."""
    power: float
    """Power with seeds and examples at hand; 0 where so few seeds cannot reach the corrected level."""
    seeds_needed: int | None
    """Seeds for 80 % power with the examples at hand; None: more than 2,000, or one run per method."""
    simulated_power: float | None
    """Power of the sign-flip test with its correction at `seeds_needed`; None above 60 seeds or 25 comparisons."""
    examples_needed: int | None
    """Examples for 80 % power with the seeds at hand; None: no number of examples is enough."""
    examples_at_least: int | None
    """Fewest examples, with any number of seeds, if the claim is to hold for other examples; None
    where seeds had different test parts."""


class Cost(StrEnum):
    """Cost that a Pareto front sets against the test loss."""

    TRAINED = "trained parameters"
    """Parameters while training; methods that prune, such as AdaLoRA, train more than they serve."""
    SERVED = "served parameters"
    TIME = "training time"
    MEMORY = "peak memory"


UNITS = {Cost.TRAINED: "", Cost.SERVED: "", Cost.TIME: "s", Cost.MEMORY: "bytes"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParetoPoint:
    """One method: mean over seeds of cost and of test loss at its own best learning rate."""

    method: str
    cost: float
    loss: float
    on_front: bool
    """Membership of the front: no other method costs and loses at most as much, and is better in one of both."""
    front_share: float | None
    """Share of bootstrap draws of seeds in which it is on the front; None below 2 common seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParetoFront:
    """Loss against one cost."""

    cost: Cost
    unit: str
    """`s`, `bytes`, or nothing for counts."""
    points: tuple[ParetoPoint, ...]
    """Methods by rising cost; at least one."""
    note: str
    """Methods that did not record the cost, and parts that the cost leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontArea:
    """The area under a method's own front over budgets.

    Methods that differ in nothing but rank and budget are one family, such as `uniform` at ranks 1,
    2 and 4. At a budget p its front holds the least mean test loss of its members with at most p
    served parameters. `gain` is frozen loss minus that, averaged over log2(p) between `low` and
    `high`, the budgets that all families with several members cover: nats per token, more is
    better.
    """

    family: str
    methods: tuple[str, ...]
    """Labels by rising parameters."""
    parameters: tuple[float, ...]
    losses: tuple[float, ...]
    """Mean test loss of each member over the seeds that all members have."""
    low: float | None
    high: float | None
    gain: float | None
    interval: Interval
    """Interval of `gain` over seeds, from bootstrap draws that are the same for all families."""
    difference: float | None
    """Gain minus that of the baseline's family, over the same budgets."""
    difference_interval: Interval
    note: str
    """Reason why there is no area, such as one budget only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyRate:
    """Tokens until a method's validation loss is down to the baseline's final one.

    Each seed has its own target: the final validation loss of the baseline under that seed. Between
    validations the curve is taken as straight.
    """

    reached: int
    """Number of seeds that reach it."""
    seeds: int
    """Number of paired seeds with recorded curves."""
    tokens: float | None
    """Mean number of tokens over seeds; None where any seed does not reach it."""
    share: float | None
    """Mean over seeds of the share of the baseline's training tokens."""
    interval: Interval
    """Interval of `share` over seeds."""
    note: str


class AgreementKind(StrEnum):
    """Axis along which allocations are compared."""

    SEEDS = "seeds"
    METHODS = "methods"
    METRICS = "metrics"
    TASKS = "tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Spearman correlations of ranks per site."""

    kind: AgreementKind
    about: str
    """Method whose allocations are compared; empty between methods."""
    labels: tuple[str, ...]
    """Allocations in the matrix: the first 30."""
    matrix: tuple[tuple[float | None, ...], ...]
    """Correlations, labels x labels; None where one gives every site the same rank."""
    mean: float | None
    """Mean of the correlations of every two allocations."""
    allocations: int
    """Number of allocations, also of those that are not in the matrix."""
    sites: int
    """Number of sites that all have in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetMap:
    """Shares of a method's parameters by layer and role, mean over its seeds."""

    method: str
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    ranks: tuple[tuple[float | None, ...], ...]
    """Mean rank, layers x roles; None where there is no such site."""
    shares: tuple[tuple[float, ...], ...]
    """Share of all served parameters, layers x roles; adds up to 1."""
    by_layer: tuple[float, ...]
    """Share per layer, in the order of `layers`."""
    by_role: tuple[float, ...]
    """Share per role, in the order of `roles`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Difference of losses on retained data in the unit of the loss, paired by seed and by example."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """One difference per seed, in the order of `seeds`."""
    mean: float
    sd: float | None
    interval: Interval
    """Interval for other seeds and the same examples."""
    hierarchical: Interval
    """Interval for other seeds and other examples of the same kind."""
    sign_flip: float
    """P over all sign flips, not corrected for several methods; no verdict rests on it."""

    @property
    def upper(self) -> float | None:
        """Upper end of the interval; the value of all seeds where they agree; None for one seed."""
        agreed = len(self.values) > 1 and self.interval.high is None
        return self.mean if agreed else self.interval.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """Change of the loss on one source of retained data by a method's training."""

    loss: float
    """Loss after training, mean over seeds."""
    forgotten: Change
    """Loss after training minus that of the frozen base; positive is forgotten."""
    to_baseline: Change | None
    """Loss minus that of the baseline method; None for the baseline and where no seed can be paired."""
    missing_seeds: tuple[int, ...]
    """Seeds of the method that lack scores on this source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetainedSource:
    """One source of retained data: examples of the task beside those of the study."""

    name: str
    digest: str
    examples: int
    base_loss: float
    """Loss of the frozen base before any training."""
    allowed: float | None
    """Most that a champion may forget, in the unit of the loss; None where it is not bounded."""
    unscored: tuple[str, ...]
    """Trials at their method's chosen rate that lack scores on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """Uniform ranks at one number of parameters."""

    method: str
    parameters: float
    """Mean number of trainable parameters."""
    lr: float | None
    """Its own learning rate, chosen on validation."""
    loss: float
    """Mean outcome over seeds."""
    difference: float | None
    """Mean difference to the budget's rung, in the unit of the outcome; None for that rung itself."""
    interval: Interval
    """Interval of the difference over seeds."""
    verdict: VerdictKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """Rungs of uniform ranks, and the bracket that they put around what an allocation could win.

    The bound rests on one assumption: a larger rank at its own learning rate is not worse. An allocation within the
    budget then has no more to reach than uniform ranks at many times the budget, which contain it site by site.
    """

    text: str
    """Sentence that says what there is to win."""
    warnings: tuple[str, ...]
    """Where the assumption was seen to fail, or could not be checked."""
    base: str
    """Label of the rung at the budget."""
    best: str
    """Label of the larger rung with the best mean outcome."""
    rungs: tuple[Rung, ...]
    """All rungs by rising parameters."""
    low: float | None
    """Least that the best rung wins, in the unit of the outcome; positive is better; None without an interval."""
    high: float | None
    """Most that the best rung wins, which no allocation within the budget exceeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """Share of what the planted ranks gain over uniform that a method gains."""

    method: str
    recovered: float | None
    """Share of mean gains over paired trials: 1 as the planted ranks, 0 as uniform; None where those gain nothing."""
    interval: Interval
    """Interval of the share."""
    verdict: VerdictKind
    """Verdict against uniform."""
    trainings: float | None
    """Cost of one trial with its profile and search, in trainings of its own final ranks; None where not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Headroom:
    """Gain of the planted ranks over uniform ranks: what there is to recover."""

    text: str
    """Sentence that says whether methods can be told apart."""
    oracle: str
    """Label of the method with the planted ranks."""
    share: float
    """Gain of the planted ranks as a share of the baseline's loss; 0 where they are its own."""
    interval: Interval
    """Interval of the share over paired trials."""
    trials: int
    """Number of pairs, each of one teacher and seed."""
    separates: bool
    """Mark of a gain of at least `SEPARATING` that is shown to be above 0."""
    methods: tuple[Recovery, ...]
    """All methods but the baseline, in the order of the comparison."""
