"""Pairs: the same seed and the same test examples under the method and under the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from adaptive_lora.analysis.comparison.trials import Folds
from adaptive_lora.analysis.comparison.types import Comparison
from adaptive_lora.errors import DataError
from adaptive_lora.results import EvalResult, FloatArray, IntArray, TrialRecord


@dataclass(frozen=True, slots=True)
class PairedSeed:
    """One seed under both methods; examples of all folds one after another, sorted by id."""

    seed: int
    loss: float
    """Difference of test losses in the unit of the outcome, folds averaged."""
    ids_E: NDArray[np.str_]
    folds_E: IntArray
    nll_E: FloatArray
    """Difference of summed loss per example, such as in nats."""
    fold_scale_E: FloatArray
    """Factor that gives every fold the same weight, so that the ratio of sums is `loss`."""
    tokens_E: IntArray
    exact_match: float | None
    """Difference of exact-match shares; None where not scored."""
    match_E: FloatArray | None
    """Difference of exact match per example, in the order of `ids_E`: -1, 0 or 1, scaled so that every fold weighs the
    same; None where not scored."""


def pair_seeds(method: Mapping[int, Folds], baseline: Mapping[int, Folds]) -> list[PairedSeed]:
    """Return the seeds that both have, in order.

    Raises:
        DataError: a pair was scored on different examples or tokens.
    """
    pairs: list[PairedSeed] = []
    for seed in sorted(set(method) & set(baseline)):
        pairs.append(_sharing(_pair(method[seed], baseline[seed]), pairs[-1] if pairs else None))
    return pairs


def _sharing(pair: PairedSeed, other: PairedSeed | None) -> PairedSeed:
    """Return a pair that holds the arrays of another where its own are equal; seeds mostly share their test part."""
    if other is None:
        return pair
    names = ("ids_E", "folds_E", "fold_scale_E", "tokens_E")
    both = {name: (getattr(pair, name), getattr(other, name)) for name in names}
    return replace(pair, **{n: theirs for n, (own, theirs) in both.items() if np.array_equal(own, theirs)})


def _pair(method: Folds, baseline: Folds) -> PairedSeed:
    folds = [_pair_fold(mine, theirs) for mine, theirs in zip(method, baseline, strict=True)]
    results = [(_result(mine), _result(theirs)) for mine, theirs in zip(method, baseline, strict=True)]
    tokens = [int(tokens_E.sum()) for _, _, tokens_E in folds]
    scales = [np.full(ids.size, np.mean(tokens) / t) for (ids, _, _), t in zip(folds, tokens, strict=True)]
    gaps, matches = [], []
    for mine, theirs in results:
        if mine.exact_match_E is not None and theirs.exact_match_E is not None:
            gaps.append(float(mine.exact_match_E.mean()) - float(theirs.exact_match_E.mean()))
            matches.append(mine.exact_match_E[_by_id(mine)[0]] - theirs.exact_match_E[_by_id(theirs)[0]])
    scored = len(gaps) == len(folds)
    size = np.mean([row.size for row in matches]) if scored else 0
    return PairedSeed(
        seed=method[0].seed,
        loss=float(np.mean([mine.loss for mine, _ in results]) - np.mean([theirs.loss for _, theirs in results])),
        ids_E=np.concatenate([ids for ids, _, _ in folds]),
        folds_E=np.repeat([record.fold for record in method], [ids.size for ids, _, _ in folds]),
        nll_E=np.concatenate([nll for _, nll, _ in folds]),
        fold_scale_E=np.concatenate(scales),
        tokens_E=np.concatenate([tokens_E for _, _, tokens_E in folds]),
        exact_match=float(np.mean(gaps)) if scored else None,
        match_E=np.concatenate([row * (size / row.size) for row in matches]) if scored else None,
    )


def own_values(trials: Mapping[int, Folds]) -> list[float]:
    """Return the loss of every example of all trials, scaled so that every fold weighs the same in their mean."""
    results = [_result(record) for folds in trials.values() for record in folds]
    if not results:
        return []
    examples = np.mean([result.nll_E.size for result in results])
    shares = [r.nll_E / r.tokens_E.mean() * (examples / r.nll_E.size) for r in results]
    return [float(value) for share_E in shares for value in share_E]


def _result(record: TrialRecord) -> EvalResult:
    assert record.test is not None  # `tabulate` lets no other trial through
    return record.test


def _pair_fold(method: TrialRecord, baseline: TrialRecord) -> tuple[NDArray[np.str_], FloatArray, IntArray]:
    mine, theirs = _result(method), _result(baseline)
    names = f"{method.method} and {baseline.method}, seed {method.seed}, fold {method.fold}"
    check_same_examples(mine.example_ids, theirs.example_ids, names)
    (my_order, ids_E), (their_order, _) = _by_id(mine), _by_id(theirs)
    my_tokens_E, their_tokens_E = mine.tokens_E[my_order], theirs.tokens_E[their_order]
    unequal = np.flatnonzero(my_tokens_E != their_tokens_E)
    if unequal.size:
        first = int(unequal[0])
        raise DataError(
            f"{names}: example {ids_E[first]} has {my_tokens_E[first]} supervised tokens in one "
            f"trial and {their_tokens_E[first]} in the other ({unequal.size} such examples): "
            "their losses cannot be compared; required the same tokenizer and template."
        )
    return ids_E, mine.nll_E[my_order] - theirs.nll_E[their_order], my_tokens_E


def _by_id(result: EvalResult) -> tuple[NDArray[np.intp], NDArray[np.str_]]:
    """Return the order of a trial's examples by id, and the ids in that order."""
    return _sorted_ids(result.example_ids)


@lru_cache(maxsize=32)  # one entry a fold, or a fold and a seed
def _sorted_ids(ids: tuple[str, ...]) -> tuple[NDArray[np.intp], NDArray[np.str_]]:
    ids_E = np.asarray(ids, dtype=np.str_)
    order = np.argsort(ids_E, kind="stable")
    return order, ids_E[order]


def check_same_examples(mine: tuple[str, ...], theirs: tuple[str, ...], names: str) -> None:
    """Refuse two sets of example ids that differ, naming examples of the difference.

    Raises:
        DataError: an id is in one but not in the other, or more often in one.
    """
    if mine == theirs or sorted(mine) == sorted(theirs):
        return
    only_mine, only_theirs = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    raise DataError(
        f"{names}: scored on different test examples ({len(mine)} and {len(theirs)}): "
        f"{len(only_mine)} only in the first ({', '.join(only_mine[:3]) or 'none'}), "
        f"{len(only_theirs)} only in the second ({', '.join(only_theirs[:3]) or 'none'}). "
        "Required the same data, split and fold for both."
    )


def base_model_loss(
    base_scores: EvalResult | Mapping[int, EvalResult] | None, base: Mapping[int, Folds]
) -> float | None:
    """Return the base model's test loss, after checking that it was scored on the same examples."""
    if base_scores is None:
        return None
    trials = next(iter(base.values()))
    if isinstance(base_scores, EvalResult):
        ids = tuple(name for trial in trials if trial.test for name in trial.test.example_ids)
        check_same_examples(base_scores.example_ids, ids, "frozen base and baseline")
        return base_scores.loss
    missing = [trial.fold for trial in trials if trial.fold not in base_scores]
    if missing:
        raise DataError(f"scores of the frozen base are missing for fold {missing[0]}.")
    for trial in trials:
        if trial.test:
            names = f"frozen base and baseline, fold {trial.fold}"
            check_same_examples(base_scores[trial.fold].example_ids, trial.test.example_ids, names)
    return float(np.mean([base_scores[trial.fold].loss for trial in trials]))


def used_trials(comparison: Comparison, records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Return per method the finished trials at its chosen rate, by seed and fold."""
    used: dict[str, list[TrialRecord]] = {m.label: [] for m in comparison.methods}
    chosen = {(m.label, m.lr, seed) for m in comparison.methods for seed in m.seeds}
    for record in sorted(records, key=lambda r: (r.seed, r.fold)):
        finished = record.status == "FINISHED" and record.test is not None
        if finished and (record.method, record.lr, record.seed) in chosen:
            used[record.method].append(record)
    return used


def example_differences(comparison: Comparison, records: Sequence[TrialRecord]) -> dict[str, dict[str, float]]:
    """Return per method: test example -> nats minus the baseline's, averaged over seeds.

    Methods of which no seed can be paired, or whose seeds have different test parts, are left out.
    """
    by_seed: dict[str, dict[int, Folds]] = {}
    for label, trials in used_trials(comparison, records).items():
        by_seed[label] = {seed: tuple(folds) for seed, folds in groupby(trials, key=lambda trial: trial.seed)}
    found: dict[str, dict[str, float]] = {}
    for method in comparison.methods:
        if method.most_changed:
            pairs = pair_seeds(by_seed[method.label], by_seed[comparison.baseline])
            mean_E = np.mean([pair.nll_E for pair in pairs], axis=0)
            found[method.label] = dict(zip(map(str, pairs[0].ids_E), map(float, mean_E), strict=True))
    return found
