"""Studies that add seeds until they are decided: error rates over all looks, and how many seeds they take.

    python benchmarks/simulate_looks.py --studies 2000

Differences are normal with deviation 1, looks at 6, 8, ..., 16 seeds; the fixed design trains 16 seeds of every method.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.stats import Looks

MOST, COUNTS = 16, (6, 8, 10, 12, 14, 16)
ALPHA = 0.05
METHODS = 5


@dataclass(frozen=True, slots=True)
class Ended:
    """How one simulated comparison ended."""

    kind: str
    seeds: int


def looks_at(number: int) -> Looks:
    """Return the plan up to a look."""
    return Looks(most=MOST, planned=COUNTS[: number + 1], seeds=COUNTS[: number + 1])


def decide(diff_SM: np.ndarray, margin: float) -> list[Ended]:
    """Return how a study with these differences to the baseline (seeds, methods) ends."""
    ended: dict[int, Ended] = {}
    p_M = np.ones(diff_SM.shape[1])
    for number, count in enumerate(COUNTS):
        looks, open_methods = looks_at(number), [m for m in range(p_M.size) if m not in ended]
        for method in open_methods:
            p_M[method] = stats.sequential_p(diff_SM[:count, method], looks)
        corrected_M = stats.holm(p_M)
        for method in open_methods:
            values_S = diff_SM[:count, method]
            if corrected_M[method] <= ALPHA:
                ended[method] = Ended("different", count)
            elif _equivalent(values_S, margin, looks):
                ended[method] = Ended("equivalent", count)
        if len(ended) == p_M.size:
            break
    return [ended.get(method, Ended("open", MOST)) for method in range(p_M.size)]


def _equivalent(values_S: np.ndarray, margin: float, looks: Looks) -> bool:
    """Tell whether a look shows equivalence: by both one-sided tests and by the 90 % repeated interval."""
    sides = ((-margin, "less"), (margin, "greater"))
    if any(stats.sequential_p(values_S + shift, looks, alternative=side) > ALPHA for shift, side in sides):
        return False
    interval = stats.repeated_interval(values_S, looks, confidence=1 - 2 * ALPHA)
    return interval.low is not None and -margin < interval.low and interval.high < margin


def fixed(values_S: np.ndarray, margin: float) -> str:
    """Return the verdict of the fixed design on one method."""
    if stats.sign_flip_test(values_S) <= ALPHA:
        return "different"
    interval = stats.mean_interval(values_S, confidence=1 - 2 * ALPHA)
    within = -margin < interval.low and interval.high < margin
    return "equivalent" if within and stats.equivalence_test(values_S, margin) <= ALPHA else "open"


def errors(studies: int) -> None:
    """Print how often a method that equals the baseline is ever called different, and one on the margin equivalent."""
    print("| over all looks | share | at most |\n|---|---|---|")
    for methods in (1, METHODS):
        rng = np.random.default_rng([1, methods])
        wrong = 0
        for _ in range(studies):
            diff_SM = rng.normal(size=(MOST, methods)) - (rng.normal(size=(MOST, 1)) if methods > 1 else 0)
            wrong += any(one.kind == "different" for one in decide(diff_SM, 1e-9))
        high = distributions.binom.ppf(0.995, studies, ALPHA) / studies
        label = "1 method" if methods == 1 else f"any of {methods} methods (Holm)"
        print(f"| {label} called different | {wrong / studies:.1%} | 5 % ({high:.1%} within chance) |", flush=True)
    rng = np.random.default_rng(2)
    wrong = sum(_shown(rng.normal(1.0, 1.0, MOST)) for _ in range(studies))
    print(f"| 1 method on the margin called equivalent | {wrong / studies:.1%} | 5 % |", flush=True)


def _shown(values_S: np.ndarray) -> bool:
    """Tell whether any look shows equivalence to a margin of 1."""
    return any(_equivalent(values_S[:count], 1.0, looks_at(number)) for number, count in enumerate(COUNTS))


def durations(studies: int) -> None:
    """Print verdicts and seeds at effects of 0, half and one margin, beside the fixed design."""
    print("\n| margin | effect | seeds | different, equivalent, open | 16 seeds at once |\n|---|---|---|---|---|")
    for margin in (1.0, 2.0):
        for share in (0.0, 0.5, 1.0):
            rng = np.random.default_rng([3, int(10 * share)])
            rows = rng.normal(share * margin, 1.0, (studies, MOST))
            found = [decide(row[:, None], margin)[0] for row in rows]
            kinds = [one.kind for one in found]
            once = [fixed(row, margin) for row in rows]
            names = ("different", "equivalent", "open")
            texts = [
                ", ".join(f"{100 * column.count(name) / studies:.0f}" for name in names) + " %"
                for column in (kinds, once)
            ]
            seeds = np.mean([one.seeds for one in found])
            print(f"| {margin:g} sd | {share:g} margin | {seeds:.1f} | {texts[0]} | {texts[1]} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2_000, help="simulated per row")
    arguments = parser.parse_args()
    started = time.perf_counter()
    errors(arguments.studies)
    durations(arguments.studies)
    print(f"\n{arguments.studies:,} studies a row, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
