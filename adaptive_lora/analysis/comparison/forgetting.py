"""Forgetting: losses on retained data after training, against the frozen base and the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import Change, Forgetting, RetainedSource
from adaptive_lora.analysis.comparison.inference import Rule, same_examples
from adaptive_lora.analysis.comparison.pairing import PairedSeed, pair_seeds
from adaptive_lora.analysis.comparison.trials import Folds, loss_of, per_seed
from adaptive_lora.analysis.comparison.wording import interval_text, joined, plain, signed
from adaptive_lora.errors import ConfigError

BEFORE = "frozen base"


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgettingBound:
    """The most that a champion may forget of any retained data; None in both fields is no bound."""

    loss: float | None = None
    """In the unit of the loss."""
    share: float | None = None
    """As a share of the frozen base's loss on the data."""

    def allowed(self, base_loss: float) -> float | None:
        """Return the bound for data on which the frozen base has this loss; None where there is none."""
        return self.loss if self.share is None else self.share * base_loss


UNBOUNDED = ForgettingBound()


def retained_sources(
    trials: Mapping[str, Mapping[int, Folds]], digests: Sequence[str] | None, bound: ForgettingBound
) -> tuple[RetainedSource, ...]:
    """Return the retained data that trials were scored on.

    Args:
        trials: label of each method -> its seeds at the chosen rate.
        digests: digests of the data; None: all that any trial was scored on.
        bound: the most that may be forgotten.

    Raises:
        ConfigError: there is a bound and no trial was scored.
    """
    records = [record for seeds in trials.values() for folds in seeds.values() for record in folds]
    known = list(dict.fromkeys(digest for record in records for digest in record.retained))
    found: list[RetainedSource] = []
    for digest in known if digests is None else [one for one in digests if one in known]:
        scored = [record.retained[digest] for record in records if digest in record.retained]
        name, base_loss = scored[0].source, float(np.mean([scores.before.loss for scores in scored]))
        if name in {source.name for source in found}:
            name = f"{name} ({digest[:6]})"
        found.append(
            RetainedSource(
                name=name,
                digest=digest,
                examples=len(scored[0].before.example_ids),
                base_loss=base_loss,
                allowed=bound.allowed(base_loss),
                unscored=tuple(
                    f"{record.method}, seed {record.seed}, fold {record.fold}"
                    for record in records
                    if digest not in record.retained
                ),
            )
        )
    if not found and bound != UNBOUNDED:
        raise ConfigError(
            "max_forgetting: no trial has scores on retained data; required a study that was run with --retain-data."
        )
    return tuple(found)


def measure_forgetting(
    trials: Mapping[int, Folds], base: Mapping[int, Folds], source: RetainedSource, rule: Rule, *, is_baseline: bool
) -> Forgetting | None:
    """Return what a method forgot of one source; None where no seed of it was scored.

    Args:
        trials: the method's seeds at its chosen rate.
        base: those of the baseline.
        source: the retained data.
        rule: confidence and seed of the resampling.
        is_baseline: whether the method is the baseline itself.
    """
    after = _with_scores(trials, source.digest)
    if not after:
        return None
    before = {
        seed: tuple(replace(record, method=BEFORE, test=record.retained[source.digest].before) for record in folds)
        for seed, folds in after.items()
    }
    pairs = [] if is_baseline else pair_seeds(after, _with_scores(base, source.digest))
    return Forgetting(
        loss=float(np.mean(list(per_seed(after, loss_of).values()))),
        forgotten=_change(pair_seeds(after, before), rule),
        to_baseline=_change(pairs, rule) if pairs else None,
        missing_seeds=tuple(seed for seed in trials if seed not in after),
    )


def _with_scores(trials: Mapping[int, Folds], digest: str) -> dict[int, Folds]:
    """Return the seeds whose folds all have scores on retained data, with these as their test scores."""
    return {
        seed: tuple(replace(record, test=record.retained[digest].after) for record in folds)
        for seed, folds in trials.items()
        if all(digest in record.retained for record in folds)
    }


def _change(pairs: Sequence[PairedSeed], rule: Rule) -> Change:
    diff_S = np.array([pair.loss for pair in pairs])
    return Change(
        seeds=tuple(pair.seed for pair in pairs),
        values=tuple(map(float, diff_S)),
        mean=float(diff_S.mean()),
        sd=float(diff_S.std(ddof=1)) if diff_S.size > 1 else None,
        interval=stats.mean_interval(diff_S, confidence=rule.confidence, seed=rule.seed),
        hierarchical=stats.two_way_interval(
            [pair.nll_E * pair.fold_scale_E for pair in pairs],
            [pair.tokens_E * pair.fold_scale_E for pair in pairs],
            crossed=same_examples(pairs),
            confidence=rule.confidence,
            seed=rule.seed,
        ),
        sign_flip=stats.sign_flip_test(diff_S, seed=rule.seed),
    )


def bar(forgetting: Mapping[str, Forgetting], sources: Sequence[RetainedSource], rule: Rule) -> str:
    """Return why a method cannot be champion, or ''.

    The upper end of the interval must not be above the bound: what is not known to be kept is not counted as kept.
    One seed has no interval, so that it shows nothing; of seeds that agree exactly, their value counts.
    """
    reasons = []
    for source in sources:
        if source.allowed is None:
            continue
        found, most = forgetting.get(source.name), f"at most {plain(source.allowed)} {rule.unit} may be forgotten"
        if found is None or found.missing_seeds:
            reasons.append(f"not every seed has scores on {source.name}, of which {most}")
            continue
        change, upper = found.forgotten, found.forgotten.upper
        if upper is None:
            reasons.append(f"one seed has no interval of what it forgot of {source.name}, of which {most}")
        elif upper > source.allowed:
            where = f"{signed(change.mean)} {interval_text(change.interval)}"
            reasons.append(f"the upper end of what it forgot of {source.name}, {where}, is above the bound: {most}")
    return joined(reasons)
