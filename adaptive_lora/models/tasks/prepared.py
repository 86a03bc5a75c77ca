"""A data set split and prepared for its task, without the rows that cannot be used."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Example, ExampleSet, Splits, split_set
from adaptive_lora.data.rows import MOST_NAMED, BadRow, left_out
from adaptive_lora.data.sequences import Rows
from adaptive_lora.data.summary import DataSummary, PartSize, shortened
from adaptive_lora.data.tokens import numbers_digest
from adaptive_lora.models.tasks.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedSplits:
    """The three splits of one fold, prepared for the model by the task."""

    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest training example."""
        return max(int(example.length) for example in self.train)

    @property
    def digest(self) -> str:
        """Digest over all token ids and loss masks in order, 32 hexadecimal digits."""
        splits = (self.train, self.validation, self.test)
        lengths = {"examples": [len(part) for part in splits]}
        rows = (_learned(example) for part in splits for example in part)
        return numbers_digest(chain([lengths], rows))


def _learned(item: Any) -> dict[str, Sequence[int]]:
    """Return the integers of a prepared example that training and test use."""
    return {name: values for name, values in item.numbers().items() if name != "cut"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSet:
    """A data set, its prepared splits, and its summary."""

    data: ExampleSet
    """The data set, without the examples that could not be prepared."""
    folds: list[PreparedSplits]
    summary: DataSummary


def prepare_set(task: Task, data: ExampleSet) -> PreparedSet:
    """Split a data set for each fold; every example is prepared once.

    Only examples in a split are checked. If some cannot be used and the study skips bad rows, the
    others are split as if these did not exist.

    Raises:
        DataError: a split would be empty, or examples cannot be used, of which up to 20 are named.
    """
    config = task.config.data
    made: Sequence[Any] | None = None
    while made is None:
        folds = [split_set(data, config, fold) for fold in range(config.folds)]
        used = sorted({index for splits in folds for part in _listed(splits) for index in part.indices})
        data, made = _prepared(task, data, used, config)
    places = {index: at for at, index in enumerate(used)}
    parts = [
        {
            name: Rows(made, [places[index] for index in part.indices])
            for name, part in zip(SPLITS, _listed(splits), strict=True)
        }
        for splits in folds
    ]
    _log_left_out(data)
    summary = _summary(task, data, folds[0].train[0], made, parts[0])
    return PreparedSet(data=data, folds=[PreparedSplits(**each) for each in parts], summary=summary)


def prepare_whole(task: Task, data: ExampleSet, settings: DataConfig, name: str) -> PreparedSet:
    """Prepare all examples of a data set that is scored and not trained on: they are the test split of its only fold.

    Args:
        task: task that prepares them.
        data: the data set.
        settings: what to do with bad rows.
        name: name of the split in the summary.

    Raises:
        DataError: no example is left, or examples cannot be used, of which up to 20 are named.
    """
    made: Sequence[Any] | None = None
    while made is None:
        data, made = _prepared(task, data, range(len(data.every)), settings)
    _log_left_out(data)
    summary = _summary(task, data, data.every[0], made, {name: Rows(made, range(len(made)))})
    whole = PreparedSplits(train=(), validation=(), test=made)
    return PreparedSet(data=data, folds=[whole], summary=dataclasses.replace(summary, folds=1, tested_prompts=0))


def _prepared(
    task: Task, data: ExampleSet, used: Sequence[int], settings: DataConfig
) -> tuple[ExampleSet, Sequence[Any] | None]:
    """Return the prepared examples of some indices; None with a data set without those that cannot be used."""
    chosen = Rows(data.every, used)
    try:
        return data, task.prepared(chosen)
    except BadRow as row:
        bad = task.unusable(chosen) or {0: row}
    left_out(list(bad.values()), settings, data.source)
    return data.without({used[at]: row.reason for at, row in bad.items()}), None


SPLITS = ("train", "validation", "test")
"""Names of the splits of a fold."""


def _listed(splits: Splits) -> tuple[Rows[Example], ...]:
    return splits.train, splits.validation, splits.test


def _log_left_out(data: ExampleSet) -> None:
    rows = [row for reading in data.readings for row in reading.left_out]
    for row in rows[:MOST_NAMED]:
        log.warning("left out: %s: %s", row.where, row.reason)
    if len(rows) > MOST_NAMED:
        log.warning("left out: %d more rows", len(rows) - MOST_NAMED)


def _summary(
    task: Task, data: ExampleSet, first: Example, made: Sequence[Any], parts: Mapping[str, Rows[Any]]
) -> DataSummary:
    """Return the summary of a data set.

    Args:
        task: task that prepared it.
        data: the data set.
        first: first example of the first split.
        made: prepared examples of all splits.
        parts: split of the first fold -> its prepared examples.
    """
    has_tokens = bool(made[0].numbers())  # images alone have none
    lengths, cuts, supervised = zip(*((item.length, item.cut, item.supervised_tokens) for item in made), strict=True)
    return DataSummary(
        task=task.name,
        readings=data.readings,
        template=data.template_name,
        parts={
            name: PartSize(examples=len(part), supervised_tokens=sum(supervised[index] for index in part.indices))
            for name, part in parts.items()
        },
        folds=task.config.data.folds,
        tested_prompts=len(data.every) - len(made),
        longest=task.longest if has_tokens else None,
        cut_examples=sum(number > 0 for number in cuts),
        examples=len(made),
        lost_tokens=sum(cuts),
        tokens=sum(lengths) if has_tokens else 0,
        example=shortened(task.illustrated(next(iter(parts.values()))[0], first)),
        where=first.where,
        notes=_unlearned(data.labels, parts),
    )


def _unlearned(labels: Sequence[str], parts: Mapping[str, Rows[Any]]) -> tuple[str, ...]:
    """Return a remark on the classes that no training example has; empty where there are none, or nothing is trained.

    Args:
        labels: names of the classes in the order of their indices; empty for tasks without classes.
        parts: split -> its prepared examples.
    """
    if not labels or "train" not in parts:
        return ()
    found = {name: Counter(index for item in part for index in set(item.classes)) for name, part in parts.items()}
    lacking = [index for index in range(len(labels)) if not found["train"][index]]
    if not lacking:
        return ()
    elsewhere = ", ".join(
        f"{labels[index]!r:.50} ({found['validation'][index]:,} in validation, {found['test'][index]:,} in test)"
        for index in lacking[:MOST_NAMED]
    )
    more = f" and {len(lacking) - MOST_NAMED:,} more" if len(lacking) > MOST_NAMED else ""
    return (f"classes that no training example has, so that they are not learned: {elsewhere}{more}",)
