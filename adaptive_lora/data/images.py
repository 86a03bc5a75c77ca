"""Examples with images: folders of images, hub data sets, Parquet, and tables of file names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, MediaFile, content_id
from adaptive_lora.data.labelled import class_names, class_of, pick
from adaptive_lora.data.reading import Table, read_table, separate_test
from adaptive_lora.data.rows import BadRow, refuse_unread, refuse_weights, required_text
from adaptive_lora.data.sources import LABELS, Reader, example_set
from adaptive_lora.serving import open_image

_IMAGES = ("image", "img", "picture", "pixel_values", "file_name", "image_path", "path")
_CAPTIONS = ("caption", "text", "description", "captions")
_QUESTIONS = ("question", "prompt", "instruction")
_ANSWERS = ("answer", "response", "output", "label")


_Said = Callable[[int], tuple[str | None, str, float | None]]
"""Function from row index to (question, response, target)."""


def load_classes(config: DataConfig) -> ExampleSet:
    """Return images with their classes.

    Raises:
        DataError: the data cannot be read, or a column, image or class is missing.
    """
    table = read_table(config)
    classes = class_names(table, _label_of(config, table))

    def reader(rows: Table) -> Reader:
        column = _label_of(config, rows)

        def said(index: int) -> tuple[None, str, float]:
            target = class_of(rows, index, column, classes)
            return None, classes[target], float(target)

        return _reader(rows, config, said, {column: "class"}, ("response_column",))

    return _set(config, table, reader, classes)


def load_captions(config: DataConfig) -> ExampleSet:
    """Return images with their captions.

    Raises:
        DataError: the data cannot be read, or a column, image or caption is missing.
    """

    def reader(rows: Table) -> Reader:
        column = pick(rows, config.response_column, _CAPTIONS, "response_column", "the caption")

        def said(index: int) -> tuple[None, str, None]:
            return None, required_text(rows.rows[index], column, rows.where(index)), None

        return _reader(rows, config, said, {column: "caption"}, ("response_column",))

    return _set(config, read_table(config), reader, ())


def load_questions(config: DataConfig) -> ExampleSet:
    """Return images, each with a question and its answer.

    Raises:
        DataError: the data cannot be read, or a column, image or text is missing.
    """

    def reader(rows: Table) -> Reader:
        asked = pick(rows, config.prompt_column, _QUESTIONS, "prompt_column", "the question")
        answered = pick(rows, config.response_column, _ANSWERS, "response_column", "the answer")
        image = pick(rows, config.image_column, _IMAGES, "image_column", "the image")

        def said(index: int) -> tuple[str, str, None]:
            row, where = rows.rows[index], rows.where(index)
            refuse_unread(row, (asked, answered, image), where)
            return required_text(row, asked, where), required_text(row, answered, where), None

        columns = {asked: "question", answered: "answer"}
        return _reader(rows, config, said, columns, ("prompt_column", "response_column"))

    return _set(config, read_table(config), reader, ())


def _label_of(config: DataConfig, table: Table) -> str:
    return pick(table, config.response_column, LABELS, "response_column", "the label")


def _set(config: DataConfig, table: Table, reader: Callable[[Table], Reader], labels: tuple[str, ...]) -> ExampleSet:
    test = separate_test(config)
    tested = None
    if test is not None:
        rows = read_table(test)
        tested = example_set(test, rows, reader(rows), labels=labels)
    return example_set(config, table, reader(table), labels=labels, test=tested)


def _reader(table: Table, config: DataConfig, said: _Said, columns: dict[str, str], options: tuple[str, ...]) -> Reader:
    """Return the reader of images with their texts or targets; an image's name is its digest.

    An image that occurs several times is always in one split, whatever is asked about it.
    """
    column = pick(table, config.image_column, _IMAGES, "image_column", "the image")
    seen: dict[str, int] = {}
    remarks: Counter[str] = Counter()

    def example(index: int) -> Example:
        where = table.where(index)
        refuse_weights(table.rows[index], columns, where)
        question, response, target = said(index)
        media, content = media_of(table.rows[index], column, where, table.home, opened=open_image, what="an image")
        remarks.update(_remarks(content))
        name = f"image {media.digest.hex()[:16]}"
        shown = name if question is None else f"{name}: {question} "
        return Example(
            id=content_id(shown, response, seen),
            prompt=name,
            second=None,
            question=question,
            response=response,
            target=target,
            where=where,
            media=media,
        )

    used = {column: "image", **columns}
    return Reader(
        example=example,
        columns=used,
        options=("image_column", *options),
        notes=lambda: [f"{count:,} images {remark}" for remark, count in sorted(remarks.items())],
    )


def _remarks(content: bytes) -> Iterator[str]:
    """Yield remarks on content of a readable image that is not used."""
    from PIL import Image

    with Image.open(BytesIO(content)) as image:
        if getattr(image, "n_frames", 1) > 1:
            yield "have several frames or pages: the first is used"
        if image.has_transparency_data:
            yield "have transparent pixels: their colours are used"


def media_of(
    row: Mapping[str, Any], column: str, where: str, home: Path, *, opened: Callable[[bytes], Any], what: str
) -> tuple[MediaFile, bytes]:
    """Return the image or recording of a row, and its content.

    Args:
        row: row of a table.
        column: name of the column with the content, or with the path of its file.
        where: place of the row.
        home: folder that paths are relative to.
        opened: function that decodes the content; raises ValueError where it cannot.
        what: what is required, such as `an image`.

    Raises:
        BadRow: there is no file, or it cannot be decoded.
    """
    value = row.get(column)
    content = value.get("bytes") if isinstance(value, dict) else value
    path = value if isinstance(value, str) else None
    if isinstance(value, dict) and content is None:
        path = value.get("path")
    try:
        if path is not None:
            content = (home / path).read_bytes()
        if not isinstance(content, bytes):
            got = "nothing" if value is None or content is None else type(value).__name__
            raise ValueError(f"got {got}")
        opened(content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadRow(
            where,
            f"column '{column}' must be {what}: {error}",
            reason=f"column '{column}' holds no {what.partition(' ')[2]} that can be read",
        ) from error
    source = content if path is None else str((home / path).absolute())
    return MediaFile(hashlib.sha256(content).digest(), source), content
