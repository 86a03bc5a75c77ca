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
from adaptive_lora.config import StudyConfig
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
    def standard_deviation(self) -> float:
        """Standard deviation of paired differences over seeds, at the given number of examples."""
        return self.components.standard_deviation(self.components.examples)


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
            f"a standard deviation of {example_spread:g} between examples gives one of "
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


def assumed_question(given: Mapping[str, Any], test: Mapping[str, Any]) -> Question:
    """Return the question of an assumed standard deviation.

    Args:
        given: options of the command `power`.
        test: correction, alpha and power.
    """
    examples, example_spread = given["examples"], given["example_spread"]
    noise = assumed_noise(given["spread"], seeds=0, examples=examples or 1, example_spread=example_spread)
    return Question(
        difference=given["difference"],
        components=noise,
        examples_known=example_spread is not None,
        comparisons=given["comparisons"] or 1,
        source="assumed",
        **test,
    )


def observed_question(config: StudyConfig, given: Mapping[str, Any], test: Mapping[str, Any]) -> Question:
    """Return the question of a finished study's noise, read from its store.

    Args:
        config: settings of the tracking store and the comparison.
        given: options of the command `power`, which replace what was observed.
        test: correction, alpha and power.
    """
    from adaptive_lora.runner.comparison_input import Selection, read_comparison_input
    from adaptive_lora.runner.result import compare_input
    from adaptive_lora.tracking import connect

    ids = () if given["study_id"] == "latest" else (given["study_id"],)
    store = connect(config.tracking, must_exist=True)
    comparison_input = read_comparison_input(store, Selection(study_ids=ids))
    comparison = compare_input(comparison_input, config, given["baseline"])
    noise = observed_noise(comparison)
    if given["examples"] is not None:
        noise = dataclasses.replace(noise, examples=given["examples"])
    return Question(
        difference=difference_of_interest(comparison, given["difference"], given["gain_percent"]),
        components=noise,
        examples_known=True,
        comparisons=given["comparisons"] or sum(method.difference is not None for method in comparison.methods),
        source=f"observed in {comparison_input.name}, {noise.seeds} seeds",
        **test,
    )


def answer(question: Question, shown: Sequence[int] = SHOWN_SEEDS) -> Answer:
    """Return the numbers of seeds and examples needed, by formula and simulation."""
    parts, size, sd = question.components, question.difference, question.standard_deviation
    corrected: Mapping[str, Any] = {
        "comparisons": question.comparisons,
        "correction": question.correction,
        "alpha": question.alpha,
    }
    strictest: Mapping[str, Any] = {"alpha": question.alpha / max(1, question.comparisons), "power": question.power}
    least_seeds = max(2, stats.fewest_seeds(**corrected))

    def seed_row(seeds: int) -> SeedRow:
        reachable, known = seeds >= least_seeds, question.examples_known
        return SeedRow(
            seeds=seeds,
            power=stats.paired_power(size, sd, seeds, alpha=strictest["alpha"]) if reachable else 0.0,
            simulated=stats.simulated_power(size, sd, seeds, **corrected),
            examples_needed=stats.examples_for_power(size, parts, seeds, **strictest) if known else None,
        )

    def example_row(examples: int) -> ExampleRow:
        other = parts.standard_deviation(examples)
        return ExampleRow(examples=examples, spread=other, seeds_needed=stats.seeds_for_power(size, other, **strictest))

    needed, simulated = stats.checked_seeds(size, sd, power=question.power, studies=2_000, **corrected)
    factors = _EXAMPLE_FACTORS if question.examples_known else ()
    return Answer(
        question=question,
        seeds_needed=needed,
        simulated_power=simulated,
        least_seeds=least_seeds,
        examples_at_least=stats.examples_for_new_examples(size, parts, **strictest) if parts.example > 0 else None,
        by_seeds=tuple(seed_row(seeds) for seeds in shown),
        by_examples=tuple(example_row(max(2, round(factor * parts.examples))) for factor in factors),
    )


def print_answer(found: Answer, console: Console) -> None:
    """Print the answer in a sentence, and tables of other sizes."""
    question = found.question
    checked = f" (simulated: {found.simulated_power:.0%})" if found.simulated_power is not None else ""
    console.print(
        f"[bold]{_count(found.seeds_needed)} seeds[/] show a true difference of {question.difference:.4g} nats per "
        f"token with {question.power:.0%} power{checked},\nif the standard deviation over seeds is "
        f"{question.standard_deviation:.4g} ({question.source}), with "
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
    last = [f"or test examples for {question.power:.0%}"] if question.examples_known else []
    table = _table("seeds", "power (t)", "simulated", *last)
    for row in found.by_seeds:
        examples = "not enough seeds" if row.examples_needed is None else f"{row.examples_needed:,}"
        table.add_row(str(row.seeds), f"{row.power:.0%}", f"{row.simulated:.0%}", *([examples] if last else []))
    console.print(table)
    if found.by_examples:
        table = _table("test examples", "standard deviation over seeds", "seeds")
        for other in found.by_examples:
            table.add_row(f"{other.examples:,}", f"{other.spread:.4g}", _count(other.seeds_needed))
        console.print(table)


def _count(seeds: int | None) -> str:
    return "more than 2,000" if seeds is None else f"{seeds:,}"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
