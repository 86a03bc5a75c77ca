"""Rows with pictures: folders of images, hub sets, Parquet, and tables that name files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_lora.adapter_serving import open_image
from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.labelled import LABELS, class_names, class_of, pick, text_in
from adaptive_lora.data.reading import Table, read_table, read_test_table
from adaptive_lora.data.sources import subset
from adaptive_lora.errors import DataError

_IMAGES = ("image", "img", "picture", "pixel_values", "file_name", "image_path", "path")
_CAPTIONS = ("caption", "text", "description", "captions")
_QUESTIONS = ("question", "prompt", "instruction")
_ANSWERS = ("answer", "response", "output", "label")


def load_classes(config: DataConfig) -> ExampleSet:
    """Return pictures with the class of each.

    Raises:
        DataError: unreadable, columns missing, no picture, a class that is none.
    """
    table, test = read_table(config), read_test_table(config)
    classes = class_names(table, _label_of(config, table))

    def build(rows: Table) -> tuple[Example, ...]:
        column = _label_of(config, rows)
        targets = [class_of(rows, i, column, classes) for i in range(len(rows.rows))]
        return _built(rows, config, [(None, classes[t], float(t)) for t in targets])

    return _set(config, table, test, build, classes)


def load_captions(config: DataConfig) -> ExampleSet:
    """Return pictures with the caption of each.

    Raises:
        DataError: unreadable, columns missing, no picture, an empty caption.
    """
    table, test = read_table(config), read_test_table(config)

    def build(rows: Table) -> tuple[Example, ...]:
        column = pick(rows, config.response_column, _CAPTIONS, "response_column", "the caption")
        captions = [text_in(row, column, rows.where(i)) for i, row in enumerate(rows.rows)]
        return _built(rows, config, [(None, caption, None) for caption in captions])

    return _set(config, table, test, build, ())


def load_questions(config: DataConfig) -> ExampleSet:
    """Return pictures with a question about each and its answer.

    Raises:
        DataError: unreadable, columns missing, no picture, an empty text.
    """
    table, test = read_table(config), read_test_table(config)

    def build(rows: Table) -> tuple[Example, ...]:
        asked = pick(rows, config.prompt_column, _QUESTIONS, "prompt_column", "the question")
        answered = pick(rows, config.response_column, _ANSWERS, "response_column", "the answer")
        return _built(
            rows,
            config,
            [
                (text_in(row, asked, rows.where(i)), text_in(row, answered, rows.where(i)), None)
                for i, row in enumerate(rows.rows)
            ],
        )

    return _set(config, table, test, build, ())


def _label_of(config: DataConfig, table: Table) -> str:
    return pick(table, config.response_column, LABELS, "response_column", "the label")


def _set(
    config: DataConfig, table: Table, test: Table | None, build: Any, labels: tuple[str, ...]
) -> ExampleSet:
    return ExampleSet(
        examples=subset(build(table), config),
        template={},
        source=table.name,
        labels=labels,
        test=None if test is None else build(test),
    )


def _built(
    table: Table, config: DataConfig, said: list[tuple[str | None, str, float | None]]
) -> tuple[Example, ...]:
    """Return examples of rows with (question, response, target); the picture's digest is its name.

    A picture that occurs twice never stands in two parts, whatever is asked about it.
    """
    column = pick(table, config.image_column, _IMAGES, "image_column", "the image")
    seen: dict[str, int] = {}
    examples = []
    for index, (question, response, target) in enumerate(said):
        image = _bytes(table.rows[index], column, table.where(index), table.home)
        name = f"image {hashlib.sha256(image).hexdigest()[:16]}"
        shown = name if question is None else f"{name}: {question} "
        examples.append(
            Example(
                id=content_id(shown, response, seen),
                prompt=name,
                second=None,
                question=question,
                response=response,
                target=target,
                where=table.where(index),
                image=image,
            )
        )
    return tuple(examples)


def _bytes(row: Mapping[str, Any], column: str, where: str, home: Path) -> bytes:
    """Return the file of a row's picture, checked to be one."""
    value = row[column]
    content = value.get("bytes") if isinstance(value, dict) else value
    try:
        if isinstance(value, dict) and content is None:
            content = (home / value["path"]).read_bytes()
        elif isinstance(value, str):
            content = (home / value).read_bytes()
        if not isinstance(content, bytes):
            raise ValueError(f"got {type(value).__name__}")
        open_image(content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: column '{column}' must be an image: {error}") from error
    return content
