"""Retained data: other data of a study's task, scored before and after training and never trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptive_lora.config import RetainedSource, digest
from adaptive_lora.data import ExampleSet
from adaptive_lora.data.summary import DataSummary
from adaptive_lora.errors import DataError, ModelError
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.tasks import Task
from adaptive_lora.models.tasks.prepared import PreparedSplits, prepare_whole
from adaptive_lora.results import EvalResult, RetainedScores

if TYPE_CHECKING:
    from adaptive_lora.runner.context import StudyContext


@dataclass(frozen=True, kw_only=True)
class RetainedData:
    """One source, read and prepared whole."""

    name: str
    """Name for display: that of the source, with a part of the digest where several sources share it."""
    digest: str
    """Digest of its texts, token ids and loss masks, 16 hexadecimal digits."""
    examples: Sequence[Any]
    summary: DataSummary


def read_retained(task: Task, own: ExampleSet, folds: Sequence[PreparedSplits]) -> tuple[RetainedData, ...]:
    """Read the retained data of a study.

    Args:
        task: task of the study, which prepares the examples.
        own: data of the study.
        folds: splits of the study.

    Raises:
        DataError: a source cannot be read, has other classes, or is given twice.
    """
    trained = {item.id for splits in folds for item in splits.train}
    learned = {example.prompt_key for example in own.examples if example.id in trained}
    found: dict[str, RetainedData] = {}
    for text in task.config.evaluation.retain_data:
        one = read_source(task, RetainedSource.parse(text), own.labels, learned)
        if one.digest in found:
            raise DataError(f"retain_data: {found[one.digest].name} and {one.name} have equal examples; give one.")
        found[one.digest] = one
    names = [one.name for one in found.values()]
    return tuple(
        one if names.count(one.name) == 1 else dataclasses.replace(one, name=f"{one.name} ({one.digest[:6]})")
        for one in found.values()
    )


def read_source(
    task: Task, source: RetainedSource, labels: Sequence[str] = (), learned: Iterable[bytes] = ()
) -> RetainedData:
    """Read and prepare all rows of one source.

    Args:
        task: task that prepares the examples.
        source: source with its settings.
        labels: names of the classes that it must have, for tasks with classes.
        learned: prompt keys of the training examples.
    """
    settings = source.settings(task.config.data)
    data = task.read(settings)
    if tuple(data.labels) != tuple(labels):
        raise DataError(
            f"retain_data {source.data}: required the classes of the study's own data ({', '.join(labels)}); got "
            f"{', '.join(data.labels)}."
        )
    prepared = prepare_whole(task, data, settings, "retained")
    keys = set(learned)
    repeated = sum(example.prompt_key in keys for example in prepared.data.every)
    note = f"{repeated:,} of {len(prepared.data.every):,} examples have a prompt that is trained on too"
    notes = (f"{note}: what is learned there counts against forgetting",) if repeated else ()
    contents = {"data": prepared.data.digest, "tokens": prepared.folds[0].digest}
    return RetainedData(
        name=data.source,
        digest=digest(contents),
        examples=prepared.folds[0].test,
        summary=dataclasses.replace(prepared.summary, name="retained", notes=notes),
    )


def retained_losses(context: StudyContext, model: object) -> dict[str, EvalResult]:
    """Return the scores of a model on each source of a study by digest, without generating."""
    return {one.digest: context.losses(model, one.examples) for one in context.retained}


def frozen_losses(context: StudyContext) -> dict[str, EvalResult]:
    """Return the scores of a study's base without adapter on each source by digest.

    Raises:
        ModelError: a loss is not finite.
    """
    if not context.retained:
        return {}
    context.on_base(context.base_kind)
    context.start_head(0)
    with model_errors(f"{context.architecture.kind} does not run on the retained data", context.base.model):
        found = retained_losses(context, context.base.model)
    for one in context.retained:
        if not math.isfinite(found[one.digest].loss):
            raise ModelError(
                f"base {context.base.reference.name} gives the loss {found[one.digest].loss:g} on {one.name} in "
                f"{context.runtime.precision} before any training; check its weights or use fp32."
            )
    return found


def with_base_scores(context: StudyContext, after: Mapping[str, EvalResult]) -> dict[str, RetainedScores]:
    """Return the scores after training beside those of the frozen base, by digest."""
    before = context.retained_before
    return {
        one.digest: RetainedScores(source=one.name, before=before[one.digest], after=after[one.digest])
        for one in context.retained
    }


def retained_metrics(retained: Mapping[str, RetainedScores]) -> dict[str, float]:
    """Return the metrics of a trial's retained data under their stable names."""
    found = {}
    for scores in retained.values():
        # MLflow allows these characters and `/` in a metric's name
        name = "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in scores.source)[:150]
        found[f"retained/{name}/loss_before"] = scores.before.loss
        found[f"retained/{name}/loss_after"] = scores.after.loss
        found[f"retained/{name}/forgetting"] = scores.after.loss - scores.before.loss
    return found
