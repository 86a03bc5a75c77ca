"""Labelled texts: one text or a pair per row, and a class or number to predict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.reading import Table, read_table, separate_test
from adaptive_lora.data.rows import BadRow, not_numeral, refuse_weights, required_text, scalar_text
from adaptive_lora.data.sources import LABELS, Reader, example_set
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


def load_labelled(config: DataConfig, *, numbers: bool) -> ExampleSet:
    """Return texts with their classes or numbers.

    Args:
        config: source and columns of the data.
        numbers: whether targets are numbers, not classes.

    Raises:
        DataError: the data cannot be read, a column is missing, a text is empty, or a label is not valid.
    """
    table, test = read_table(config), separate_test(config)
    texts, label = columns_of(config, table)
    classes = () if numbers else class_names(table, label)
    return example_set(
        config,
        table,
        _reader(config, table, texts, label, classes),
        labels=classes,
        test=None if test is None else _test_set(test, classes),
    )


def _test_set(config: DataConfig, classes: tuple[str, ...]) -> ExampleSet:
    table = read_table(config)
    reader = _reader(config, table, *columns_of(config, table), classes)
    return example_set(config, table, reader, labels=classes)


def columns_of(config: DataConfig, table: Table) -> tuple[tuple[str, ...], str]:
    """Return the one or two text columns, and the label column.

    Raises:
        DataError: a column is missing, or cannot be determined.
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
    """Raise DataError if a table does not have a column."""
    if name not in table.columns:
        raise DataError(f"{table.name}: {unknown_name('column', name, table.columns)}")


def pick(table: Table, given: str | None, known: Iterable[str], option: str, what: str) -> str:
    """Return the column given by the user, or the first known name that the table has.

    Raises:
        DataError: the table has none of them.
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


def require_one_kind(table: Table, column: str, classes: Mapping[Any, int]) -> None:
    """Raise DataError if some of a column's classes are numbers, and others names; texts may be both.

    Args:
        table: table of the rows.
        column: column of the classes.
        classes: class -> index of a row that has it.
    """
    number = next((value for value in classes if not isinstance(value, str)), None)
    name = next((value for value in classes if not_numeral(value)), None)
    if number is not None and name is not None:
        shown = " and ".join(f"{value!r:.50} ({table.where(classes[value])})" for value in (number, name))
        raise DataError(
            f"{table.name}: column '{column}' has numbers and names as classes, such as {shown}; required one kind. "
            "Write the names of all, or numbers whose names the data set declares."
        )


def class_names(table: Table, column: str) -> tuple[str, ...]:
    """Return the names of the classes: those of the data set, or the sorted distinct values.

    Raises:
        DataError: there are fewer than two classes, or some are numbers and some are names.
    """
    names = table.classes.get(column)
    if names is None:
        values = [row.get(column) for row in table.rows]
        whole = all(type(value) is int for value in values if value is not None)
        texts = {text for value in values if (text := scalar_text(value))}
        require_one_kind(table, column, {value: at for at, value in enumerate(values) if scalar_text(value)})
        odd = next((type(v).__name__ for v in values if v and scalar_text(v) is None), None)
        if odd is not None and not texts:
            raise DataError(
                f"{table.name}: column '{column}' holds values of the type {odd}; required one "
                "class per row, as text or number."
            )
        names = tuple(sorted(texts, key=int) if whole else sorted(texts))
    if len(names) < 2:
        raise DataError(f"{table.name}: column '{column}' has {len(names)} class; required at least two.")
    return names


def class_of(table: Table, index: int, column: str, classes: Sequence[str]) -> int:
    """Return the index of a row's class.

    Raises:
        BadRow: the class is missing, or not one of `classes`.
    """
    value = table.rows[index].get(column)
    text = scalar_text(value)
    names = table.classes.get(column, ())
    if type(value) is int or text not in names:  # a class index; in CSV as text, after the names were tried
        text = dict(zip(map(str, range(len(names))), names, strict=True)).get(str(text), text)
    if text not in classes:
        raise BadRow(
            table.where(index),
            f"column '{column}' must be one of {', '.join(classes)}; got {value!r}",
            reason=f"column '{column}' holds no known class",
        )
    return classes.index(text)


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    value = row.get(column)
    try:
        number = math.nan if not_numeral(value) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(
            where,
            f"column '{column}' must be a number; got {row.get(column)!r}",
            reason=f"column '{column}' holds no number",
        )
    return number


def _reader(config: DataConfig, table: Table, texts: tuple[str, ...], label: str, classes: tuple[str, ...]) -> Reader:
    for name in (*texts, label):
        require_column(table, name)
    seen: dict[str, int] = {}

    def example(index: int) -> Example:
        row, where = table.rows[index], table.where(index)
        refuse_weights(row, (*texts, label), where)
        first, *rest = (required_text(row, column, where) for column in texts)
        if classes:
            target = float(class_of(table, index, label, classes))
            response = classes[int(target)]
        else:
            target = _number(row, label, where)
            response = repr(target)
        return Example(
            id=content_id("\0".join([first, *rest]), response, seen),
            prompt=first,
            second=rest[0] if rest else None,
            response=response,
            target=target,
            where=where,
        )

    roles = ("text", "second text") if len(texts) > 1 else ("text",)
    return Reader(
        example=example,
        columns={**dict(zip(texts, roles, strict=True)), label: "class" if classes else "number"},
        options=("prompt_column", "input_column", "response_column"),
    )
