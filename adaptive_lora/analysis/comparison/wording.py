"""Numbers in words: one wording for verdict, terminal, Markdown and page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from adaptive_lora.analysis.comparison.types import Parameters, SeedMean
from adaptive_lora.analysis.stats import FIELLER, REPEATED, STUDENT, Interval

MINUS = "\N{MINUS SIGN}"
ABSENT = "n/a"


@cache
def environment(package: str) -> Environment:
    """Return the environment of a package's templates: nothing undefined, and in HTML everything escaped."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def signed(value: float, digits: int = 4) -> str:
    """Return a difference with its sign; one that would round to 0 keeps a digit."""
    text = f"{value:+,.{digits}f}"
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        text = f"{value:+.1g}"
    return text.replace("-", MINUS)


def plain(value: float | None, digits: int = 4, scale: float = 1.0) -> str:
    """Return a number with fixed digits, or n/a."""
    return ABSENT if value is None else f"{value * scale:.{digits}f}".replace("-", MINUS)


def mean_text(of_seeds: SeedMean, digits: int = 4, scale: float = 1.0) -> str:
    """Return "mean ± standard deviation", the mean alone for one seed, or n/a."""
    text = plain(of_seeds.mean, digits, scale)
    return text if of_seeds.sd is None else f"{text} ± {plain(of_seeds.sd, digits, scale)}"


def amount(number: str, unit: str) -> str:
    """Return a number with its unit; a score such as an accuracy has none."""
    return f"{number} {unit}" if unit else number


def interval_text(interval: Interval, number: Callable[[float], str] = signed) -> str:
    """Return "[low, high]", or n/a."""
    if interval.low is None or interval.high is None:
        return ABSENT
    return f"[{number(interval.low)}, {number(interval.high)}]"


def interval_clause(interval: Interval, confidence: float) -> str:
    """Return the interval with its level and method, or why there is none."""
    if interval.low is None or interval.high is None:
        return f"no interval: {interval.note}"
    return f"{confidence_text(confidence)} interval {interval_text(interval)} by {method_text(interval.method)}"


def confidence_text(confidence: float) -> str:
    """Return a confidence such as "95 %"."""
    return f"{100 * confidence:g} %"


def method_text(method: str) -> str:
    """Return the method of an interval in words, such as "BCa bootstrap"."""
    return method if method in (REPEATED, FIELLER) or STUDENT in method else f"{method} bootstrap"


def intervals_note(intervals: Iterable[Interval | None]) -> str:
    """Return how intervals were made as a sentence to follow others; empty where there is none."""
    methods = interval_methods(intervals)
    return f" Intervals: {methods}." if methods else ""


def interval_methods(intervals: Iterable[Interval | None]) -> str:
    """Return how intervals over seeds were made, in words; empty where there is none."""
    made = {i.method for i in intervals if i is not None and i.low is not None}
    return joined([method_text(method) for method in sorted(made)])


def p_text(p: float | None) -> str:
    """Return a p-value with three significant digits, or n/a."""
    return ABSENT if p is None else f"{p:.3g}"


def percent(share: float, digits: int = 1) -> str:
    """Return a share of the baseline as a signed percentage."""
    return f"{100 * share:+.{digits}f} %".replace("-", MINUS)


def whole_percent(share: float) -> str:
    """Return a share in whole percent, without the sign of percent."""
    return f"{100 * share:.0f}".replace("-", MINUS)


def count(number: float | None) -> str:
    """Return a count with separators; a mean of unequal counts keeps one decimal."""
    if number is None:
        return ABSENT
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def bytes_text(of_seeds: SeedMean) -> str:
    """Return memory in MiB or GiB, or n/a."""
    if of_seeds.mean is None:
        return ABSENT
    mebibytes = of_seeds.mean / 2**20
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def parameters_text(parameters: Parameters) -> str:
    """Return a method's parameters against the baseline's, to follow a verdict; empty where not known."""
    if not parameters.known:
        return ""
    if parameters.difference == 0:
        return "at equal parameters"
    word = "fewer" if parameters.difference < 0 else "more"
    amount = count(abs(parameters.difference))
    if parameters.matched:
        return f"at equal parameters ({amount} {word})"
    if parameters.share is None:
        return f"with {amount} {word} parameters"
    return f"with {100 * abs(parameters.share):.1f} % ({amount}) {word} parameters"


def joined(items: Sequence[str]) -> str:
    """Return "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def named(labels: Sequence[str], most: int = 4) -> str:
    """Return labels in words; of a long list the first ones and how many more."""
    if len(labels) <= most + 1:
        return joined(labels)
    return joined([*labels[:most], f"{len(labels) - most} others"])


def plural(number: int, word: str) -> str:
    """Return "1 seed", "2 seeds"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def span(values: Iterable[float], number: Callable[[float], str] = count) -> str:
    """Return "lowest to highest", or the one value that all are."""
    low, *_, high = [*sorted(values)] * 2
    return number(low) if low == high else f"{number(low)} to {number(high)}"
