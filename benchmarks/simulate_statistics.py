"""Do the statistics hold what they promise? False positives and power by simulation.

Prints the rows of the README; `interval_coverage.py` has the intervals over seeds:

    python benchmarks/simulate_statistics.py --studies 4000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
from scipy import stats as distributions

from adaptive_lora.analysis import stats

SEEDS = (6, 8, 10)
METHODS = 5
Row = tuple[str, float, float, int]
"""What was counted, its share, the share promised, and of how many."""


def normal(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """Return normal noise of deviation 1."""
    return rng.normal(0.0, 1.0, size)


def equivalent(diff_S: np.ndarray, margin: float) -> bool:
    """Tell whether equivalence is shown: by sign flips and by the 90 % interval."""
    interval = stats.mean_interval(diff_S, confidence=0.9)
    within = -margin < interval.low and interval.high < margin
    return within and stats.equivalence_test(diff_S, margin) <= 0.05


def false_positives(studies: int) -> Iterator[Row]:
    """Yield how often methods that equal the baseline are called different at 5 %."""
    for seeds in SEEDS:
        rng = np.random.default_rng([1, seeds])
        many = 25 * studies
        diff = normal(rng, (seeds, many)) - normal(rng, (seeds, many))
        found = (stats.sign_flip_ps(diff) <= 0.05).mean()
        level = 2 * np.floor(0.05 * 2 ** (seeds - 1)) / 2**seeds  # 5 % as the flips allow it
        yield f"sign flips, one method, {seeds} seeds: false positives", found, level, many
    for name in ("holm", "max_t"):
        for seeds in (8, 10):
            rng = np.random.default_rng([2, seeds])
            wrong = 0
            for _ in range(studies):
                diff_SM = normal(rng, (seeds, METHODS)) - normal(rng, (seeds, 1))
                p_M = stats.holm(stats.sign_flip_ps(diff_SM)) if name == "holm" else stats.step_down_max_t(diff_SM)
                wrong += bool((p_M <= 0.05).any())
            label = f"{name}, {METHODS} methods, {seeds} seeds: any false positive"
            yield label, wrong / studies, 0.05, studies
    rng = np.random.default_rng(3)
    share = []
    for _ in range(studies):
        diff_SM = normal(rng, (10, METHODS)) - normal(rng, (10, 1))
        diff_SM[:, :2] += 3.0  # two real differences among five
        found_M = stats.benjamini_hochberg(stats.sign_flip_ps(diff_SM)) <= 0.05
        share.append(found_M[2:].sum() / max(1, found_M.sum()))
    label = "benjamini_hochberg, 2 of 5 methods differ, 10 seeds: share of false findings"
    yield label, float(np.mean(share)), 0.05, studies
    for seeds in (5, 6, 10):
        rng = np.random.default_rng([4, seeds])
        rows = normal(rng, (studies, seeds)) * 0.5 + 1.0  # the truth lies on the margin
        wrong = np.mean([equivalent(row, 1.0) for row in rows])
        yield f"equivalence at the margin, {seeds} seeds: wrongly shown", wrong, 0.05, studies


def coverage(studies: int) -> Iterator[Row]:
    """Yield how often the 95 % interval of the effect size holds the truth."""
    for seeds in SEEDS:
        rng = np.random.default_rng([7, seeds])
        hits, count = 0, max(1, studies // 4)
        for row in rng.normal(-0.8, 1.0, (count, seeds)):
            interval = stats.paired_effect(row).interval
            hits += interval.low <= -0.8 <= interval.high
        yield f"interval of the effect size d_z, {seeds} seeds", hits / count, 0.95, count


def power(studies: int) -> Iterator[Row]:
    """Yield the power that the recommended seeds give by sign flips with their correction."""
    for size in (0.7, 1.0, 1.5):
        for comparisons, correction in ((1, "holm"), (METHODS, "holm"), (METHODS, "max_t")):
            seeds, _ = stats.checked_seeds(size, 1.0, comparisons=comparisons, correction=correction, studies=2_000)
            found = stats.simulated_power(
                size, 1.0, seeds, comparisons=comparisons, correction=correction, studies=studies, seed=8
            )
            label = f"{correction}, d_z {size:g}, {comparisons} compared: power at {seeds} seeds"
            yield label, found, 0.8, studies


def main() -> None:
    """Print every rate with its Monte Carlo band."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=4_000, help="simulated per row")
    arguments = parser.parse_args()
    started = time.perf_counter()
    print("| simulated | share | promised | 99 % band of the promise |\n|---|---|---|---|")
    for part in (false_positives, coverage, power):
        for label, share, promised, count in part(arguments.studies):
            low, high = distributions.binom.interval(0.99, count, promised)
            band = f"{low / count:.1%} to {high / count:.1%}"
            print(f"| {label} | {share:.1%} | {promised:.1%} | {band} |", flush=True)
    print(f"\n{arguments.studies:,} studies a row, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
