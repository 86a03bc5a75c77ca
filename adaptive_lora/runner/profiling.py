"""The inputs of importance profiles: other tasks' data, batches drawn for a seed, and the trained probe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import MethodSpec, allocate
from adaptive_lora.config import ProfileConfig, digest
from adaptive_lora.data import ExampleSet
from adaptive_lora.data.sequences import Joined, Rows
from adaptive_lora.data.summary import DataSummary
from adaptive_lora.errors import DataError
from adaptive_lora.methods.adapters import attach, detach
from adaptive_lora.methods.importance import TrainedProbe
from adaptive_lora.methods.importance.capture import frozen
from adaptive_lora.models.base import gradient_checkpointing
from adaptive_lora.models.tasks import Task
from adaptive_lora.models.tasks.prepared import SPLITS, PreparedSplits, prepare_set
from adaptive_lora.seeding import rng_for, torch_stream
from adaptive_lora.training import Trainer, TrainInputs

if TYPE_CHECKING:
    from adaptive_lora.runner.context import StudyContext

OWN = "own"
"""Name of a study's own data in `profiled_on`."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaskData:
    """Splits that profiles with `profiled_on` are measured on."""

    folds: Sequence[PreparedSplits]
    """Splits of each fold; of several tasks each has the same number of examples, in turn."""
    digest: str
    """Digest of the data, token ids and loss masks of all tasks."""
    summaries: Sequence[DataSummary]
    """Summaries of the data that are not the study's own."""


def read_tasks(task: Task, tasks: Sequence[str], own: ExampleSet, own_folds: Sequence[PreparedSplits]) -> TaskData:
    """Read other tasks' data with the study's settings for columns, template and splits.

    Of several tasks, each gives as many examples as the smallest one, from the beginning of its splits.

    Args:
        task: task of the study, which prepares the examples.
        tasks: data sources, or `own`.
        own: data of the study.
        own_folds: splits of the study.

    Raises:
        DataError: a task's data cannot be read, or have other classes.
    """
    each: list[Sequence[PreparedSplits]] = []
    digests, summaries, left_out = [], [], Counter[str]()
    for source in tasks:
        data, folds = own, own_folds
        if source != OWN:
            data = task.read(dataclasses.replace(task.config.data, data=source))
            if data.labels != own.labels:
                raise DataError(
                    f"profiled_on={source}: required the classes of the study's own data "
                    f"({', '.join(own.labels)}); got {', '.join(data.labels)}."
                )
            prepared = prepare_set(task, data)
            data, folds = prepared.data, prepared.folds
            summaries.append(prepared.summary)
            left_out += data.reasons
        digests.append(data.digest)
        each.append(folds)
    joined = [_in_turn(splits) for splits in zip(*each, strict=True)]
    shared = {"tasks": digests, "tokens": joined[0].digest}
    return TaskData(joined, digest({**shared, **({"left_out": left_out} if left_out else {})}), summaries)


def _in_turn(splits: Sequence[PreparedSplits]) -> PreparedSplits:
    """Return the splits of several tasks as one, with the tasks' examples interleaved."""
    return PreparedSplits(**{name: _interleaved([getattr(each, name) for each in splits]) for name in SPLITS})


def _interleaved(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return the first items of each part, then the second ones, and so on to the end of the shortest part."""
    starts = list(accumulate(map(len, parts), initial=0))[:-1]
    return Rows(Joined(*parts), [start + at for at in range(min(map(len, parts))) for start in starts])


def drawn(examples: Sequence[Any], settings: ProfileConfig, *, seed: int, purpose: str, fold: int) -> list[list[Any]]:
    """Return the batches of examples that a seed draws for a purpose."""
    size = settings.profile_batch_size
    order = rng_for(seed, purpose, fold).permutation(len(examples))[: settings.profile_batches * size]
    return [[examples[index] for index in order[start : start + size]] for start in range(0, len(order), size)]


@contextmanager
def trained_probe(context: StudyContext, splits: PreparedSplits, *, seed: int, fold: int) -> Iterator[TrainedProbe]:
    """Train adapters of one rank on every site for a short while; remove them at the end of the block.

    Uses the study's settings and the middle one of its learning rates.
    """
    model, settings, probe = context.base.model, context.config.train, context.config.profile
    config = dataclasses.replace(settings, epochs=min(settings.epochs, probe.probe_epochs), patience=0)
    uniform = MethodSpec.build("uniform", {"rank": min(probe.probe_rank, *(site.max_rank for site in context.sites))})
    plan = allocate(uniform, context.sites, alpha=settings.alpha, scaling=settings.scaling)
    rates = sorted(context.config.lr)
    inputs = TrainInputs(
        examples=splits.train,
        collate=context.task.collate,
        validate=lambda adapted: context.losses(adapted, splits.validation).loss,
        loss=context.loss,
        running=context.task.running,
    )
    with frozen(model), torch_stream(seed, "probe", fold):
        adapted = attach(model, plan, seed=seed, dropout=settings.dropout, head=context.base.head)
        try:
            adapted.to(context.runtime.device)
            with gradient_checkpointing(model, config.gradient_checkpointing):
                lr = rates[len(rates) // 2]
                result = Trainer(adapted, inputs, config, context.runtime, lr=lr, seed=seed).run()
            yield TrainedProbe(model=adapted, tokens=result.tokens)
        finally:
            detach(adapted)
