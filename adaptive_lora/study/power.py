"""Number of seeds and examples that a study needs, from assumed noise or from an earlier study."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.comparison.wording import plural
from adaptive_lora.analysis.stats import Components, Correction
from adaptive_lora.errors import ConfigError, DataError

SHOWN_SEEDS = (5, 6, 8, 10, 12, 16, 20, 30)
_EXAMPLE_FACTORS = (0.25, 0.5, 1, 2, 4, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Difference to detect, noise, and number of methods."""

    difference: float
    """True difference in test loss, in nats per token."""
    components: Components
    """Noise of a paired difference, with the numbers of examples and seeds at which it was observed or
    assumed. If only the total standard deviation is known, all of it counts as between seeds."""
    examples_known: bool
    """Knowledge of the noise of single examples, without which the number of examples cannot be varied."""
    comparisons: int
    """Number of methods compared with the baseline."""
    correction: Correction
    alpha: float
    power: float
    source: str
    """Source of the noise, for display."""

    @property
    def spread(self) -> float:
        """Standard deviation of paired differences over seeds, at the given number of examples."""
        return self.components.standard_deviation(self.components.examples)

    @property
    def alpha_each(self) -> float:
        """Strictest significance level of the correction for one method."""
        return self.alpha / max(1, self.comparisons)

    @property
    def fewest_seeds(self) -> int:
        """Minimum number of paired seeds at which any result can be significant."""
        fewest = stats.fewest_seeds(self.alpha, comparisons=self.comparisons, correction=self.correction)
        return max(2, fewest)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRow:
    """Power at a number of seeds."""

    seeds: int
    power: float
    """Power of the paired t test at the strictest level of the correction; 0 if the sign-flip test
    cannot reach this level with so few seeds."""
    simulated: float
    """Simulated power of the sign-flip test with its correction."""
    examples_needed: int | None
    """Number of test examples for the wanted power; None: no number is sufficient, or it is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleRow:
    """Seeds needed at a number of test examples."""

    examples: int
    spread: float
    """Standard deviation of paired differences over seeds."""
    seeds_needed: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Required size of the study."""

    question: Question
    seeds_needed: int | None
    simulated_power: float | None
    """Simulated power at `seeds_needed`; None above 60 seeds."""
    least_seeds: int
    """Minimum number of seeds at which any result can be significant."""
    examples_at_least: int | None
    """Minimum number of test examples, with any number of seeds, for a claim about other examples."""
    by_seeds: tuple[SeedRow, ...]
    by_examples: tuple[ExampleRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self)


def assumed_noise(spread: float, *, seeds: int, examples: int, example_spread: float | None) -> Components:
    """Return the noise components of an assumed standard deviation.

    Raises:
        ConfigError: single examples alone would give a larger standard deviation.
    """
    residual = 0.0 if example_spread is None else example_spread**2
    between = spread**2 - residual / examples
    if between < 0:
        raise ConfigError(
            f"an example spread of {example_spread:g} gives a spread of "
            f"{math.sqrt(residual / examples):.4g} over seeds with {examples} examples, more than "
            f"the {spread:g} given: raise --spread or --examples, or lower --example-spread."
        )
    return Components(seed=between, example=0.0, residual=residual, seeds=seeds, examples=examples)


def observed_noise(comparison: Comparison) -> Components:
    """Return the noise components of a finished study: variances averaged over its methods.

    Raises:
        DataError: no method has two paired seeds.
    """
    found = [
        method.difference.components
        for method in comparison.methods
        if method.difference is not None and method.difference.components is not None
    ]
    if not found:
        raise DataError("this study shows no spread: required a method with at least two paired seeds.")
    parts = ("seed", "example", "residual")
    means = {name: sum(getattr(one, name) for one in found) / len(found) for name in parts}
    return Components(**means, seeds=min(one.seeds for one in found), examples=found[0].examples)


def difference_of_interest(comparison: Comparison, difference: float | None, gain_percent: float | None) -> float:
    """Return the difference to detect, from a finished study; by default its margin.

    Raises:
        ConfigError: a share of the gain is given and the study has no base scores, or nothing is
            given and it has no margin.
    """
    if difference is not None:
        return difference
    if gain_percent is not None:
        base = comparison.methods[0].loss.mean
        if comparison.frozen_loss is None or base is None or comparison.frozen_loss <= base:
            raise ConfigError(
                "--gain-percent needs a study whose baseline gains over the frozen base; give --difference instead."
            )
        return (comparison.frozen_loss - base) * gain_percent / 100
    if comparison.margin.value is None:
        raise ConfigError("this study has no margin; give --difference.")
    return comparison.margin.value


def answer(question: Question, shown: Sequence[int] = SHOWN_SEEDS) -> Answer:
    """Return the numbers of seeds and examples needed, by formula and simulation."""
    parts, size = question.components, question.difference
    common: Mapping[str, Any] = {
        "comparisons": question.comparisons,
        "correction": question.correction,
        "alpha": question.alpha,
    }
    needed, simulated = stats.checked_seeds(size, question.spread, power=question.power, studies=2_000, **common)
    least = None
    if parts.example > 0:
        least = stats.examples_for_new_examples(size, parts, alpha=question.alpha_each, power=question.power)
    return Answer(
        question=question,
        seeds_needed=needed,
        simulated_power=simulated,
        least_seeds=question.fewest_seeds,
        examples_at_least=least,
        by_seeds=tuple(_seed_row(question, seeds, common) for seeds in shown),
        by_examples=_example_rows(question) if question.examples_known else (),
    )


def _seed_row(question: Question, seeds: int, common: Mapping[str, Any]) -> SeedRow:
    needed = None
    if question.examples_known:
        needed = stats.examples_for_power(
            question.difference, question.components, seeds, alpha=question.alpha_each, power=question.power
        )
    spread, power = question.spread, 0.0
    if seeds >= question.fewest_seeds:
        power = stats.paired_power(question.difference, spread, seeds, alpha=question.alpha_each)
    return SeedRow(
        seeds=seeds,
        power=power,
        simulated=stats.simulated_power(question.difference, spread, seeds, **common),
        examples_needed=needed,
    )


def _example_rows(question: Question) -> tuple[ExampleRow, ...]:
    rows = []
    for factor in _EXAMPLE_FACTORS:
        examples = max(2, round(factor * question.components.examples))
        spread = question.components.standard_deviation(examples)
        needed = stats.seeds_for_power(question.difference, spread, alpha=question.alpha_each, power=question.power)
        rows.append(ExampleRow(examples=examples, spread=spread, seeds_needed=needed))
    return tuple(rows)


def print_answer(found: Answer, console: Console) -> None:
    """Print the answer in a sentence, and tables of other sizes."""
    question = found.question
    seeds = "more than 2,000" if found.seeds_needed is None else f"{found.seeds_needed:,}"
    checked = f" (simulated: {found.simulated_power:.0%})" if found.simulated_power is not None else ""
    console.print(
        f"[bold]{seeds} seeds[/] show a true difference of {question.difference:.4g} nats per "
        f"token with {question.power:.0%} power{checked},\nagainst a spread of "
        f"{question.spread:.4g} over seeds ({question.source}), with "
        f"{plural(question.comparisons, 'method')} compared by {question.correction} at "
        f"{question.alpha:g}.\nUnder {found.least_seeds} seeds no result can be significant.",
        highlight=False,
    )
    if found.examples_at_least is not None:
        console.print(
            f"A claim about other examples of the same kind needs at least "
            f"{found.examples_at_least:,} test examples, however many seeds.",
            highlight=False,
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["seeds", "power (t)", "simulated"]
    if question.examples_known:
        columns.append(f"or test examples for {question.power:.0%}")
    for column in columns:
        table.add_column(column, justify="right")
    for row in found.by_seeds:
        cells = [str(row.seeds), f"{row.power:.0%}", f"{row.simulated:.0%}"]
        if question.examples_known:
            cells.append("not enough seeds" if row.examples_needed is None else f"{row.examples_needed:,}")
        table.add_row(*cells)
    console.print(table)
    if not found.by_examples:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("test examples", "spread over seeds", "seeds"):
        table.add_column(column, justify="right")
    for other in found.by_examples:
        wanted = "more than 2,000" if other.seeds_needed is None else f"{other.seeds_needed:,}"
        table.add_row(f"{other.examples:,}", f"{other.spread:.4g}", wanted)
    console.print(table)
