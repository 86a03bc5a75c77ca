"""How often do 95 % intervals over 2 to 12 seeds hold the truth?

Prints the tables of docs/intervals.md as Markdown, with their Monte Carlo error:

    python benchmarks/interval_coverage.py --studies 4000
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from adaptive_lora.analysis import stats

SEEDS = range(2, 13)
EXAMPLES = 100
TWO_WAY_DRAWS = 999
Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Candidate = Callable[[np.ndarray], tuple[float, float]]

NOISES: Mapping[str, Noise] = {
    "normal": lambda rng, size: rng.normal(0, 1, size),
    "exponential": lambda rng, size: rng.exponential(1, size) - 1,
    "lognormal": lambda rng, size: rng.lognormal(0, 1, size) - math.exp(0.5),
    "mostly equal": lambda rng, size: np.round(rng.normal(0, 0.6, size)),
}
"""Paired differences of mean 0; the last as of exact match, where many seeds differ by nothing."""


def ends(interval: stats.Interval) -> tuple[float, float]:
    """Return the ends, NaN where there is no interval."""
    if interval.low is None or interval.high is None:
        return math.nan, math.nan
    return interval.low, interval.high


def bootstrap_t(values_S: np.ndarray, draws: int) -> tuple[float, float]:
    """Return the bootstrap-t interval (Efron & Tibshirani 1993, section 12.5); it may be infinite.

    A draw without spread has an infinite t.
    """
    rng = np.random.default_rng(0)
    drawn_BS = values_S[rng.integers(0, values_S.size, (draws, values_S.size))]
    shift_B, sd_B = drawn_BS.mean(axis=1) - values_S.mean(), drawn_BS.std(axis=1, ddof=1)
    flat_B = sd_B <= 1e-12
    t_B = np.where(flat_B, np.copysign(np.inf, shift_B), shift_B / np.where(flat_B, 1, sd_B))
    low, high = np.quantile(t_B, [0.025, 0.975], method="inverted_cdf")
    mean, sd = values_S.mean(), values_S.std(ddof=1)
    return mean - high * sd, mean - low * sd


def coverage_and_width(candidate: Candidate, rows_NS: np.ndarray) -> tuple[float, float]:
    """Return the share of the existing intervals that hold 0, and their median width."""
    ends_N2 = np.array([candidate(row) for row in rows_NS if np.ptp(row) > 0])
    holds_N = (ends_N2[:, 0] <= 0) & (ends_N2[:, 1] >= 0)
    return float(holds_N.mean()), float(np.median(ends_N2[:, 1] - ends_N2[:, 0]))


def over_seeds(studies: int, draws: int) -> None:
    """Print coverage and median width of three kinds of interval over seeds."""
    candidates: Mapping[str, Candidate] = {
        "t": lambda row: ends(stats.t_interval(row)),
        "BCa": lambda row: ends(stats.bootstrap_interval(row, draws=draws)),
        "bootstrap-t": lambda row: bootstrap_t(row, draws),
    }
    for name, noise in NOISES.items():
        print(f"\n{name.capitalize()} differences:\n")
        print("| seeds | shown | t | BCa | bootstrap-t | widths: t | BCa | bootstrap-t |")
        print("|---" * 8 + "|")
        for seeds in SEEDS:
            rows_NS = noise(np.random.default_rng([5, seeds]), (studies, seeds))
            found = {key: coverage_and_width(one, rows_NS) for key, one in candidates.items()}
            shown = "t" if stats.few_seeds(seeds, 0.95) else "BCa"
            shares = " | ".join(f"{100 * found[key][0]:.1f} %" for key in candidates)
            widths = " | ".join(f"{found[key][1]:.2f}" for key in candidates)
            print(f"| {seeds} | {shown} | {shares} | {widths} |", flush=True)


def over_seeds_and_examples(studies: int) -> None:
    """Print coverage of the interval shown over seeds and examples."""
    spreads = (0.05, 0.15, 0.5)
    print(f"\nNormal differences, {EXAMPLES} examples shared by all seeds, {studies:,} studies:\n")
    columns = (f"deviation between seeds {between:g}" for between in spreads)
    print(f"| seeds | {' | '.join(columns)} |")
    print("|---" * (1 + len(spreads)) + "|")
    for seeds in SEEDS:
        cells = []
        for between in spreads:
            rng, hits = np.random.default_rng([6, seeds]), 0
            for _ in range(studies):
                diff_SE = (
                    rng.normal(0, between, (seeds, 1))
                    + rng.normal(0, 1.0, (1, EXAMPLES))
                    + rng.normal(0, 0.5, (seeds, EXAMPLES))
                )
                low, high = ends(
                    stats.two_way_interval(diff_SE, np.ones_like(diff_SE), crossed=True, draws=TWO_WAY_DRAWS)
                )
                hits += low <= 0 <= high
            cells.append(f"{100 * hits / studies:.1f} %")
        print(f"| {seeds} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=4_000, help="simulated per cell")
    parser.add_argument("--draws", type=int, default=1_999, help="of each bootstrap over seeds")
    arguments = parser.parse_args()
    started = time.perf_counter()
    over_seeds(arguments.studies, arguments.draws)
    over_seeds_and_examples(max(1, arguments.studies // 4))
    error = 100 * math.sqrt(0.95 * 0.05 / arguments.studies)
    print(
        f"\n{arguments.studies:,} studies a cell: standard error {error:.2f} points where the "
        f"truth is 95 %; {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
