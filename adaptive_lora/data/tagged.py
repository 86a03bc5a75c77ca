"""Texts of words with a tag for each, as in named entity recognition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.labelled import pick, require_one_kind
from adaptive_lora.data.reading import Table, read_table, separate_test
from adaptive_lora.data.rows import BadRow, refuse_weights, required_text
from adaptive_lora.data.sources import Reader, example_set
from adaptive_lora.errors import DataError

_WORDS = ("tokens", "words")
"""Names of columns with lists of words."""
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")
"""Names of columns with lists of tags."""


def load_tagged(config: DataConfig) -> ExampleSet:
    """Return texts whose prompt is their words and whose response is their tags, joined by blanks.

    Raises:
        DataError: the data cannot be read, a column is missing, or words and tags do not fit together.
    """
    table, test = read_table(config), separate_test(config)
    names = tag_names(table, _tags_of(config, table))
    tested = None
    if test is not None:
        rows = read_table(test)
        tested = example_set(test, rows, _reader(test, rows, names), labels=names)
    return example_set(config, table, _reader(config, table, names), labels=names, test=tested)


def has_tags(config: DataConfig, table: Table) -> bool:
    """Return whether a table has a list of words and a list of tags in its first row."""
    row = table.rows[table.chosen[0]]
    named = ((config.prompt_column, _WORDS), (config.response_column, _TAGS))
    columns = [given or next((name for name in known if name in row), "") for given, known in named]
    return all(isinstance(row.get(column), list) for column in columns)


def _tags_of(config: DataConfig, table: Table) -> str:
    return pick(table, config.response_column, _TAGS, "response_column", "the tags")


def tag_names(table: Table, column: str) -> tuple[str, ...]:
    """Return the names of the tags: those of the data set, or the sorted distinct values.

    Raises:
        DataError: there are fewer than two, or some are numbers and some are names.
    """
    names = table.classes.get(column)
    if names is None:
        given = dict[object, int]()
        for index, row in enumerate(table.rows):
            tags = row.get(column)
            given |= {tag: index for tag in tags if tag not in given and _text(tag)} if isinstance(tags, list) else {}
        require_one_kind(table, column, given)
        names = tuple(sorted(set(map(str, given))))
    if len(names) < 2:
        raise DataError(
            f"{table.name}: column '{column}' has {len(names)} tags; required lists with at least two different ones."
        )
    return names


def _text(tag: object) -> str | None:
    """Return a tag as text, also one given as a whole number; None for any other value."""
    return str(tag) if isinstance(tag, str | int) and not isinstance(tag, bool) else None


def _reader(config: DataConfig, table: Table, names: tuple[str, ...]) -> Reader:
    written = pick(table, config.prompt_column, _WORDS, "prompt_column", "the words")
    tagged, seen = _tags_of(config, table), dict[str, int]()
    columns, known = {written: "words", tagged: "tags"}, table.classes.get(tagged, ())

    def example(index: int) -> Example:
        row, where = table.rows[index], table.where(index)
        refuse_weights(row, columns, where)
        words, given = _listed(row, written, where), _listed(row, tagged, where)
        if any(not isinstance(word, str) or not word or " " in word for word in words):
            raise BadRow(where, f"column '{written}' must be a list of texts, none of which is empty or has a blank")
        if len(words) != len(given):
            raise BadRow(
                where,
                f"{len(words)} words in '{written}' and {len(given)} tags in '{tagged}'; required one tag a word",
                reason=f"not one tag in '{tagged}' for each word in '{written}'",
            )
        tags = [known[t] if type(t) is int and 0 <= t < len(known) else _text(t) for t in given]
        odd = next((tag for tag, name in zip(given, tags, strict=True) if name not in names), None)
        if odd is not None or None in tags:
            raise BadRow(
                where,
                f"column '{tagged}' must hold tags of {', '.join(names)}; got {odd!r:.80}",
                reason=f"column '{tagged}' holds an unknown tag",
            )
        text, response = required_text({written: " ".join(words)}, written, where), " ".join(map(str, tags))
        return Example(id=content_id(text, response, seen), prompt=text, response=response, where=where)

    return Reader(example=example, columns=columns, options=("prompt_column", "response_column"))


def _listed(row: Mapping[str, Any], column: str, where: str) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else "nothing" if value is None else type(value).__name__
        raise BadRow(where, f"column '{column}' must be a list with one value a word; got {got}")
    return value
