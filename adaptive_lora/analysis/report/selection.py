"""Which trials a figure is drawn from: those that the comparison rests on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.comparison.pairing import pair_seeds
from adaptive_lora.results import TrialRecord


def used_trials(comparison: Comparison, records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Return per method the finished trials at its chosen rate, by seed and fold."""
    used: dict[str, list[TrialRecord]] = {m.label: [] for m in comparison.methods}
    for record in sorted(records, key=lambda r: (r.seed, r.fold)):
        method = comparison.method(record.method)
        finished = record.status == "FINISHED" and record.test is not None
        if finished and record.lr == method.lr and record.seed in method.seeds:
            used[record.method].append(record)
    return used


def example_differences(comparison: Comparison, records: Sequence[TrialRecord]) -> dict[str, dict[str, float]]:
    """Return per method: test example -> nats minus the baseline's, averaged over seeds.

    Methods of which no seed can be paired, or whose seeds have different test parts, are left out.
    """
    used = used_trials(comparison, records)
    by_seed = {label: _by_seed(trials) for label, trials in used.items()}
    found: dict[str, dict[str, float]] = {}
    for method in comparison.methods:
        if not method.most_changed:
            continue
        pairs = pair_seeds(by_seed[method.label], by_seed[comparison.baseline])
        mean_E = np.mean([pair.nll_E for pair in pairs], axis=0)
        found[method.label] = {str(name): float(value) for name, value in zip(pairs[0].ids_E, mean_E, strict=True)}
    return found


def _by_seed(trials: Sequence[TrialRecord]) -> Mapping[int, tuple[TrialRecord, ...]]:
    seeds: dict[int, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        seeds[trial.seed].append(trial)
    return {seed: tuple(folds) for seed, folds in seeds.items()}
