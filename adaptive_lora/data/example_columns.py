"""Examples as columns in a file without a name, from which each is made when it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from adaptive_lora.data.arrow_file import Columns, Row, stored
from adaptive_lora.data.examples import Example, MediaFile
from adaptive_lora.data.sequences import ROWS_AT_ONCE, LazySequence
from adaptive_lora.data.token_cache import token_folder

_TEXTS = ("id", "prompt", "response", "second", "question", "messages", "full_messages", "tools")
_SCHEMA = pa.schema(
    {
        **dict.fromkeys(_TEXTS, pa.large_string()),
        "where": pa.large_binary(),  # names of files need not be Unicode
        "target": pa.float64(),
        "unlearned": pa.list_(pa.int32()),
        "digest": pa.binary(),
        "path": pa.large_binary(),
        "content": pa.large_binary(),
    }
)


class StoredExamples(LazySequence[Example]):
    """Examples in an unnamed file of the cache folder; in memory without such a folder or room in it."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """Store the examples, of which only some are in memory at a time."""
        columns = stored(_SCHEMA, map(_row, examples), token_folder())
        self._length = len(columns)
        self._batches = _used(columns)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._length

    def item(self, index: int) -> Example:
        """Return the example at an index."""
        batch, at = divmod(index, ROWS_AT_ONCE)
        return _example({name: chunk[at].as_py() for name, chunk in self._batches[batch].items()})

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples, of which a batch is read at once."""
        for batch in self._batches:
            values = [chunk.to_pylist() for chunk in batch.values()]
            for row in zip(*values, strict=True):
                yield _example(dict(zip(batch, row, strict=True)))


def _used(columns: Columns) -> list[dict[str, Any]]:
    """Return name -> Arrow array of each batch, without arrays that have no value."""
    chunks = {name: columns.chunks(name) for name in columns.names}
    batches = [dict(zip(chunks, each, strict=True)) for each in zip(*chunks.values(), strict=True)]
    return [{name: chunk for name, chunk in batch.items() if chunk.null_count < len(chunk)} for batch in batches]


def _row(example: Example) -> Row:
    """Return the columns of an example; None where a field has its default."""
    media = example.media
    source = None if media is None else media.source
    return {
        "id": example.id,
        "prompt": example.prompt,
        "response": example.response,
        "where": os.fsencode(example.where),
        "second": example.second,
        "target": example.target,
        "question": example.question,
        "messages": json.dumps(example.messages) if example.messages else None,
        "full_messages": example.full_messages or None,
        "unlearned": example.unlearned or None,
        "tools": example.tools or None,
        "digest": None if media is None else media.digest,
        "path": os.fsencode(source) if isinstance(source, str) else None,
        "content": source if isinstance(source, bytes) else None,
    }


def _example(row: Mapping[str, Any]) -> Example:
    fields = {name: value for name, value in row.items() if value is not None}
    fields["where"] = os.fsdecode(fields["where"])
    if "messages" in fields:
        fields["messages"] = tuple((role, text) for role, text in json.loads(fields["messages"]))
    if "unlearned" in fields:
        fields["unlearned"] = tuple(fields["unlearned"])
    if "digest" in fields:
        content = fields.pop("content", None)
        source = os.fsdecode(fields.pop("path")) if content is None else content
        fields["media"] = MediaFile(fields.pop("digest"), source)
    return Example(**fields)
