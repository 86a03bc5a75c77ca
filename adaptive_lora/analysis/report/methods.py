"""The methods paragraph of a paper, written from what the trials recorded.

Every clause rests on a recorded value that all trials behind the numbers share; where one was not
recorded, or differs between trials, the clause is left out rather than assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from adaptive_lora.analysis.comparison import AuditKind, Comparison, MethodSummary
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.pairing import used_trials
from adaptive_lora.analysis.comparison.wording import (
    confidence_text,
    count,
    interval_methods,
    joined,
    named,
    p_text,
    percent,
    plain,
    plural,
)
from adaptive_lora.analysis.stats.significance import EXACT_SEEDS
from adaptive_lora.config.precision import Precision
from adaptive_lora.results import TrialRecord

_CORRECTIONS: Mapping[str, str] = {
    "holm": "Holm's step-down procedure",
    "max_t": "the step-down max-T procedure of Westfall and Young over joint sign flips",
    "benjamini_hochberg": "the procedure of Benjamini and Hochberg, which bounds the false discovery rate",
}


def methods_text(comparison: Comparison, records: Sequence[TrialRecord]) -> str:
    """Return one paragraph: data, training, seeds, rates, parameters, test, intervals, margin."""
    used = [trial for trials in used_trials(comparison, records).values() for trial in trials]
    if not used:
        return ""
    sentences = [
        *_design(comparison, used),
        *_training(used),
        *_profiles(used),
        *_pairing(comparison),
        *_rates(comparison),
        *_sizes(comparison),
        *_inference(comparison),
        *_losses(comparison, records),
    ]
    return " ".join(sentences)


def _shared(trials: Sequence[TrialRecord], key: str) -> str | None:
    """Return a setting that all trials recorded alike; None where they differ or it is missing."""
    values = {trial.settings.get(key) for trial in trials}
    value = values.pop() if len(values) == 1 else None
    return None if value in (None, "None") else value


def _tag(trials: Sequence[TrialRecord], key: str) -> str | None:
    values = {trial.tags.get(key) for trial in trials}
    return values.pop() if len(values) == 1 else None


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def _design(comparison: Comparison, used: Sequence[TrialRecord]) -> Iterator[str]:
    others = [m.label for m in comparison.methods if m.difference is not None]
    model, data = _shared(used, "cfg.model"), _shared(used, "cfg.data")
    where = ""
    if model and data:
        where = f" on the base model {model} and the data set {data}"
    against = f"{plural(len(others), 'method')} ({named(others, 6)})"
    yield f"We compared {against} with {comparison.baseline}{where}."
    parts = []
    for name, part in (("train", "training"), ("validation", "validation")):
        sizes = [trial.settings.get(f"data.{name}_examples") for trial in used]
        if all(sizes):
            parts.append(f"{_span([float(size) for size in sizes if size])} {part}")
    tests = [trial.test for trial in used if trial.test is not None]
    parts.append(f"{_span([len(test.example_ids) for test in tests])} test")
    tokens = _span([int(test.tokens_E.sum()) for test in tests])
    folds = len({trial.fold for trial in used})
    each = f" in each of {folds} folds" if folds > 1 else ""
    yield f"There were {joined(parts)} examples{each}, the test part with {tokens} scored tokens."


def _training(used: Sequence[TrialRecord]) -> Iterator[str]:
    clauses = []
    batch, accumulation = _shared(used, "cfg.batch_size"), _shared(used, "cfg.accumulation")
    epochs, most = _shared(used, "cfg.epochs"), _shared(used, "cfg.max_steps")
    if epochs:
        limit = f" or at most {most} optimiser steps" if most else ""
        clauses.append(f"for {float(epochs):g} epochs{limit}")
    if batch and accumulation:
        clauses.append(f"with {int(batch) * int(accumulation)} examples per optimiser step")
    schedule, warmup = _shared(used, "cfg.schedule"), _shared(used, "cfg.warmup_share")
    if schedule and warmup:
        rise = f"after a linear warm-up over {100 * float(warmup):g} % of the steps"
        clauses.append(f"a {schedule} decay of the learning rate {rise if float(warmup) else ''}")
    decay, clip = _shared(used, "cfg.weight_decay"), _shared(used, "cfg.clip_norm")
    if decay:
        clauses.append(f"weight decay {float(decay):g}")
    if clip:
        limited = f"gradients clipped to norm {float(clip):g}"
        clauses.append(limited if float(clip) else "no clipping of gradients")
    dropout = _shared(used, "cfg.dropout")
    if dropout and float(dropout):
        clauses.append(f"dropout {float(dropout):g} before the adapters")
    precision = _tag(used, "precision")
    if precision in tuple(Precision):
        clauses.append(f"compute precision {Precision(precision).description}")
    if _shared(used, "model.adapter_dtype") == "torch.float32":
        clauses.append("trainable weights in float32")
    if clauses:
        text = ", ".join(clause.strip() for clause in clauses)
        yield f"Every trial was trained with AdamW {text}."
    patience = _shared(used, "cfg.patience")
    if patience and int(patience):
        yield f"Training stopped after {patience} validations without improvement."
    loss_on = _shared(used, "cfg.loss_on")
    if loss_on:
        what = "the response's tokens" if loss_on == "response" else "all tokens"
        yield f"The loss is cross-entropy over {what}."


def _profiles(used: Sequence[TrialRecord]) -> Iterator[str]:
    measured = [t for t in used if t.settings.get("method.metric") not in (None, "None")]
    batches = _shared(measured, "cfg.profile_batches")
    size = _shared(measured, "cfg.profile_batch_size")
    if batches and size:
        metrics = sorted({trial.settings["method.metric"] for trial in measured})
        yield (
            f"Importance ({joined(metrics)}) was measured per seed on at most "
            f"{int(batches) * int(size)} training examples."
        )


def _pairing(comparison: Comparison) -> Iterator[str]:
    seeds = sorted({seed for m in comparison.methods for seed in m.seeds})
    listed = ", ".join(map(str, seeds))
    yield f"Each method was trained under {plural(len(seeds), 'seed')} ({listed})."
    order = [entry.kind for entry in comparison.audit if entry.topic == "data order"]
    if order and set(order) == {AuditKind.OK}:
        yield "Under one seed all methods learned from the same batches in the same order."


def _rates(comparison: Comparison) -> Iterator[str]:
    grids = {tuple(rate.lr for rate in m.rates) for m in comparison.methods if m.seeds}
    longest = max(grids, key=len)
    rates = joined([f"{lr:g}" for lr in longest])
    if len(grids) > 1:
        sizes = _span([len(grid) for grid in grids])
        yield (
            f"Peak learning rates were chosen per method by mean validation loss from grids that "
            f"differed between methods ({sizes} rates)."
        )
    elif len(longest) == 1:
        yield f"The peak learning rate was {rates} for all methods and was not tuned."
    else:
        chosen = sorted({m.lr for m in comparison.methods if m.lr is not None})
        picked = joined([f"{lr:g}" for lr in chosen])
        yield (
            f"Each method's peak learning rate was the one of {rates} with the lowest mean "
            f"validation loss among those that finished for the most seeds (chosen: {picked}); "
            "test scores played no part."
        )
    if comparison.raced_rates:
        yield (
            f"Of {sum(len(m.rates) for m in comparison.methods)} learning rates "
            f"{comparison.raced_rates} were stopped during training by successive halving on "
            "validation loss pooled over seeds, by one rule for all methods."
        )


def _sizes(comparison: Comparison) -> Iterator[str]:
    base = comparison.method(comparison.baseline).parameters
    text = f"{comparison.baseline} has {count(base.mean)} trainable parameters"
    others = [m for m in comparison.methods if m.difference is not None]
    shares = [m.parameters.share for m in others if m.parameters.share is not None]
    if others and all(m.parameters.difference == 0 for m in others):
        text += ", and so has every other method"
    elif shares:
        apart = percent(min(shares))
        if max(shares) != min(shares):
            apart += f" to {percent(max(shares))}"
        text += f"; the others differ from that by {apart}"
    yield f"{text}."


def _inference(comparison: Comparison) -> Iterator[str]:
    compared = [m for m in comparison.methods if m.difference is not None]
    if not compared:
        return
    differences = [m.difference for m in compared if m.difference is not None]
    exact = all(len(d.seeds) <= EXACT_SEEDS for d in differences)
    kind = "an exact two-sided sign-flip test" if exact else "a two-sided sign-flip test"
    yield (
        f"The outcome is the test loss in {comparison.unit}, as the difference to "
        f"{comparison.baseline} under the same seed; the unit of inference is the seed."
    )
    seeds = max(len(d.seeds) for d in differences)
    least = min(d.tests.attainable for d in differences)
    corrected = ""
    if len(compared) > 1:
        corrected = f", corrected for {len(compared)} comparisons by "
        corrected += _CORRECTIONS[comparison.correction]
    yield (
        f"P-values are from {kind} over seeds (least attainable with {plural(seeds, 'seed')} "
        f"before correction: {p_text(least)}){corrected}, at level {comparison.alpha:g}."
    )
    yield from _intervals(comparison, compared)
    margin = comparison.margin
    if margin.value is not None:
        yield (
            f"Equivalence (two one-sided tests) and non-inferiority were tested by sign flips "
            f"against a margin of {plain(margin.value)} {comparison.unit}, {margin.source}, at "
            f"level {comparison.alpha:g} each, without correction for several methods, and had to "
            f"agree with the {confidence_text(one_sided(comparison.confidence))} interval."
        )


def _intervals(comparison: Comparison, compared: Sequence[MethodSummary]) -> Iterator[str]:
    made = [m.difference.interval for m in compared if m.difference is not None]
    methods = interval_methods(made)
    if methods:
        text = f"Intervals are {confidence_text(comparison.confidence)} intervals over seeds "
        text += f"({methods})"
        if "bootstrap" in methods:
            text += ", the nominal confidence of a bootstrap expanded for the number of seeds"
        yield f"{text}."


def _losses(comparison: Comparison, records: Sequence[TrialRecord]) -> Iterator[str]:
    if comparison.failed_trials:
        yield (f"{comparison.failed_trials} of {plural(comparison.trials, 'trial')} failed and are left out.")
    packages = _tag([record for record in records if record.status == "FINISHED"], "packages")
    if packages:
        yield f"Software: {packages}."
