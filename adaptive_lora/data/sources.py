"""Prompts and responses from rows: the embedded generator's, local files' and hub sets'."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adaptive_lora.adapter_serving import render
from adaptive_lora.config import DataConfig
from adaptive_lora.data.conversations import (
    CHAT,
    MESSAGES,
    PLAIN,
    TEXT,
    conversations,
    plain_texts,
)
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.reading import Table, read_table
from adaptive_lora.data.templates import load_template
from adaptive_lora.errors import DataError
from adaptive_lora.seeding import rng_for

Columns = tuple[tuple[str, str | None, str], ...]
"""Instruction or input, optional context, response."""
_KNOWN_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", "context", "answer"),  # GSM8K
)
EMBEDDED_EXAMPLES = 900
"""How many examples the embedded generator makes where max_examples is not given."""


def load_examples(config: DataConfig, *, known: Columns = ()) -> ExampleSet:
    """Return the examples of a data configuration with prompts rendered.

    Args:
        config: where they stand.
        known: columns that are found beside the usual ones.

    Raises:
        DataError: unreadable file (with line), missing columns, empty text, nothing left.
    """
    if config.data == "embedded":
        from adaptive_lora.embedded import task_examples

        count = config.max_examples or EMBEDDED_EXAMPLES
        rows: Sequence[Mapping[str, Any]] = task_examples(count, config.split_seed)
        name, unit = "embedded", "example"
    else:
        table = read_table(config)
        rows, name, unit = table.rows, table.name, table.unit
        if (found := _without_prompts(config, table, known)) is not None:
            return found
    prompt, context, response = _columns(config, rows, name, known)
    template = load_template(_template_name(config, (prompt, context, response)))
    examples = _build(rows, (prompt, context, response), template, name, unit)
    return ExampleSet(
        examples=subset(examples, config),
        template=template,
        source=name,
        test=None
        if config.test_data is None and config.test_split is None
        else _test_examples(config, known),
    )


def _without_prompts(config: DataConfig, table: Table, known: Columns) -> ExampleSet | None:
    """Return the examples of conversations or plain text; None where there are prompts."""
    if config.prompt_column or config.response_column:
        return None
    columns = set(table.columns)
    if MESSAGES in columns:
        examples, template = conversations(table), CHAT
    elif TEXT in columns and not any({c[0], c[2]} <= columns for c in (*_KNOWN_COLUMNS, *known)):
        examples, template = plain_texts(table), PLAIN
    else:
        return None
    own = config.test_data is not None or config.test_split is not None
    return ExampleSet(
        examples=subset(examples, config),
        template=template,
        source=table.name,
        test=_test_examples(config, known) if own else None,
    )


def _test_examples(config: DataConfig, known: Columns) -> tuple[Example, ...]:
    whole = dataclasses.replace(
        config,
        data=config.test_data or config.data,
        data_subset=None if config.test_data else config.data_subset,
        data_split=config.test_split or config.data_split,
        test_data=None,
        test_split=None,
        max_examples=None,
    )
    return load_examples(whole, known=known).examples


def subset(examples: tuple[Example, ...], config: DataConfig) -> tuple[Example, ...]:
    """Return `max_examples` of the examples, drawn by the split's seed, in their order."""
    if config.max_examples is None or config.max_examples >= len(examples):
        return examples
    chosen = rng_for(config.split_seed, "subset").choice(
        len(examples), config.max_examples, replace=False
    )
    return tuple(examples[index] for index in sorted(chosen))


def _template_name(config: DataConfig, columns: tuple[str, str | None, str]) -> str:
    if config.template != "auto":
        return config.template
    if config.data == "embedded":
        return "compact"
    known = {(prompt, response) for prompt, _, response in _KNOWN_COLUMNS}
    return "alpaca" if (columns[0], columns[2]) in known else "plain"


def _columns(
    config: DataConfig, rows: Sequence[Mapping[str, Any]], name: str, more: Columns
) -> tuple[str, str | None, str]:
    """Decide which columns are instruction, input and response."""
    have = set(rows[0])
    wanted = (config.prompt_column, config.input_column, config.response_column)
    missing = [column for column in wanted if column is not None and column not in have]
    listed = (*_KNOWN_COLUMNS, *more)
    known = next((c for c in listed if {c[0], c[2]} <= have), (None, None, None))
    prompt, response = wanted[0] or known[0], wanted[2] or known[2]
    if missing or prompt is None or response is None:
        lacking = f"missing {', '.join(missing)}; " if missing else ""
        raise DataError(
            f"{name}: {lacking}required Alpaca columns (instruction, input, output), Dolly columns "
            "(instruction, context, response), GSM8K's (question, answer), messages, text, or "
            "--prompt-column and --response-column; "
            f"found {_listed(have)}."
        )
    context = wanted[1] or (known[1] if known[1] in have else None)
    return prompt, context, response


def _listed(names: Iterable[str], most: int = 20) -> str:
    listed = sorted(f"{name:.80}" for name in names)
    more = f" and {len(listed) - most:,} more columns" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _build(
    rows: Iterable[Mapping[str, Any]],
    columns: tuple[str, str | None, str],
    template: Mapping[str, str],
    name: str,
    unit: str,
) -> tuple[Example, ...]:
    seen: dict[str, int] = {}
    examples = []
    for index, row in enumerate(rows):
        where = f"{name} {unit} {index}"
        texts = [_text(row, column, where) for column in columns]
        for column, text in ((columns[0], texts[0]), (columns[2], texts[2])):
            if not text.strip():
                raise DataError(f"{where}: column '{column}' is empty; fill it or drop the row.")
        prompt = render(template, texts[0], texts[1])
        examples.append(
            Example(
                id=content_id(prompt, texts[2], seen), prompt=prompt, response=texts[2], where=where
            )
        )
    return tuple(examples)


def _text(row: Mapping[str, Any], column: str | None, where: str) -> str:
    value = "" if column is None else row.get(column)
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: column '{column}' must be text, got {value}.")
    if isinstance(value, str | int | float):
        text = str(value)
        if "\0" in text or (not text.isprintable() and not _encodes(text)):
            raise DataError(
                f"{where}: column '{column}' holds a NUL sign or an unpaired surrogate."
            )
        return text
    raise DataError(f"{where}: column '{column}' must be text, got {type(value).__name__}.")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
