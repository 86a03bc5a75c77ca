"""Texts with labels: one text a row or a pair, and a class or a number to predict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.reading import Table, read_table, read_test_table
from adaptive_lora.data.sources import subset
from adaptive_lora.errors import DataError, unknown_name

_TEXTS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),  # GLUE
    ("premise", "hypothesis"),  # NLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
)
LABELS = ("label", "labels", "class", "target", "score")


def load_labelled(config: DataConfig, *, numbers: bool) -> ExampleSet:
    """Return texts with the class or number of each.

    Args:
        config: where they stand, and in which columns.
        numbers: targets are numbers, not classes.

    Raises:
        DataError: unreadable, columns missing, an empty text, a label that is none.
    """
    table, test = read_table(config), read_test_table(config)
    texts, label = columns_of(config, table)
    classes = () if numbers else class_names(table, label)
    return ExampleSet(
        examples=subset(_build(table, texts, label, classes), config),
        template={},
        source=table.name,
        labels=classes,
        test=None if test is None else _build(test, *columns_of(config, test), classes),
    )


def columns_of(config: DataConfig, table: Table) -> tuple[tuple[str, ...], str]:
    """Return the one or two columns of text, and that of the label.

    Raises:
        DataError: they cannot be told, or are not there.
    """
    found = next((names for names in _TEXTS if set(names) <= set(table.columns)), ())
    given = tuple(filter(None, (config.prompt_column, config.input_column)))
    label = pick(table, config.response_column, LABELS, "response_column", "the label")
    if config.input_column is not None and config.prompt_column is None:
        raise DataError("input_column is the second text of a pair; required prompt_column too.")
    for name in given:
        require_column(table, name)
    texts = given or found
    if not texts:
        raise DataError(
            f"{table.name}: required a column of text ("
            f"{', '.join('+'.join(names) for names in _TEXTS)}) or --prompt-column, and "
            f"--input-column for pairs; found {', '.join(table.columns)}."
        )
    return texts, label


def require_column(table: Table, name: str) -> None:
    """Raise DataError where a table does not have a column."""
    if name not in table.columns:
        raise DataError(f"{table.name}: {unknown_name('column', name, table.columns)}")


def pick(table: Table, given: str | None, known: Iterable[str], option: str, what: str) -> str:
    """Return the column that was named, or the first known name that the table has.

    Raises:
        DataError: neither is there.
    """
    if given is not None:
        require_column(table, given)
        return given
    listed = tuple(known)
    for name in listed:
        if name in table.columns:
            return name
    raise DataError(
        f"{table.name}: required a column of {what} ({', '.join(listed)}) or "
        f"--{option.replace('_', '-')}; found {', '.join(table.columns)}."
    )


def class_names(table: Table, column: str) -> tuple[str, ...]:
    """Return the names of the classes: the data set's own, or the different values in order.

    Raises:
        DataError: fewer than two.
    """
    names = table.classes.get(column)
    if names is None:
        values = {row[column] for row in table.rows if row.get(column) is not None}
        whole = all(isinstance(value, int) for value in values)
        names = tuple(map(str, sorted(values) if whole else sorted(map(str, values))))
    if len(names) < 2:
        raise DataError(
            f"{table.name}: column '{column}' has {len(names)} class; required at least two."
        )
    return names


def class_of(table: Table, index: int, column: str, classes: Sequence[str]) -> int:
    """Return the index of a row's class.

    Raises:
        DataError: there is none, or one that the training data does not have.
    """
    value = table.rows[index].get(column)
    names = table.classes.get(column)
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        value = names[value]
    if value is None or str(value) not in classes:
        raise DataError(
            f"{table.where(index)}: column '{column}' must be one of {', '.join(classes)}; got "
            f"{value!r}."
        )
    return classes.index(str(value))


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    try:
        number = float(row[column])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: column '{column}' must be a number; got {row[column]!r}.")
    return number


def text_in(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return a text of a row.

    Raises:
        DataError: it is empty or no text.
    """
    value = row.get(column)
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f"{where}: column '{column}' must be text and not empty; got {value!r}.")
    return str(value)


def _build(
    table: Table, texts: tuple[str, ...], label: str, classes: tuple[str, ...]
) -> tuple[Example, ...]:
    for name in (*texts, label):
        require_column(table, name)
    seen: dict[str, int] = {}
    examples = []
    for index, row in enumerate(table.rows):
        where = table.where(index)
        first, *rest = (text_in(row, column, where) for column in texts)
        if classes:
            target = float(class_of(table, index, label, classes))
            response = classes[int(target)]
        else:
            target = _number(row, label, where)
            response = repr(target)
        examples.append(
            Example(
                id=content_id("\0".join([first, *rest]), response, seen),
                prompt=first,
                second=rest[0] if rest else None,
                response=response,
                target=target,
                where=where,
            )
        )
    return tuple(examples)
