"""Columns of a data set in Arrow's format: written batch by batch, and mapped into memory from their file.

A file is an Arrow stream whose schema has a key, followed by the SHA-256 of the stream. It is verified on
reading, and mapped through the descriptor that was verified.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from adaptive_lora.data.sequences import batched
from adaptive_lora.interruption import replacing

_READ_AT_ONCE = 2**20
"""Number of bytes read at once to verify a file."""
_DIGEST_BYTES = 32

Row = Mapping[str, Any]


class CorruptColumns(Exception):
    """A file's content differs from what was written."""


class Columns:
    """Rows of named columns, mapped from a file or in memory."""

    def __init__(self, content: Any) -> None:
        """Read the schema and the places of all batches of an Arrow stream; values are read on access."""
        with pa.ipc.open_stream(content) as reader:
            self.key: str = (reader.schema.metadata or {}).get(b"key", b"").decode()
            """Key that the rows were written with."""
            self.names: tuple[str, ...] = tuple(reader.schema.names)
            self._batches = tuple(reader)

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(batch.num_rows for batch in self._batches)

    def chunks(self, name: str) -> list[Any]:
        """Return a column's Arrow arrays of `ROWS_AT_ONCE` rows."""
        return [batch.column(name) for batch in self._batches]


def integers(rows: Iterable[Mapping[str, Sequence[int]]]) -> tuple[pa.Schema, Iterable[Row]]:
    """Return the schema of rows of integer sequences, and the rows; all have the names of the first one."""
    remaining = iter(rows)
    first = next(remaining, {})
    return pa.schema({name: pa.list_(pa.int32()) for name in first}), chain([first], remaining)


def read_columns(path: Path, key: str, count: int) -> Columns:
    """Map rows written by `write_columns`.

    Args:
        path: path of the file.
        key: key that the file must have.
        count: number of rows that it must have.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptColumns: the content differs from what was written.
    """
    with path.open("rb") as file:
        rest = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
        digest = hashlib.sha256()
        while rest > 0 and (content := file.read(min(rest, _READ_AT_ONCE))):
            digest.update(content)
            rest -= len(content)
        if rest or file.read() != digest.digest():
            raise CorruptColumns("its content is not what was written")
        try:
            found = Columns(_mapped(file))
        except pa.ArrowInvalid as error:
            raise CorruptColumns(str(error)) from error
    if found.key != key:
        raise CorruptColumns("it was made from something else")
    if len(found) != count:
        raise CorruptColumns(f"it does not hold {count} examples")
    return found


def write_columns(path: Path, key: str, schema: pa.Schema, rows: Iterable[Row]) -> Columns:
    """Write rows atomically, readable by this user alone, and map them.

    Args:
        path: path of the file; an existing file is replaced atomically.
        key: hash of what the rows were made from; `read_columns` requires the same.
        schema: names and types of the columns.
        rows: column -> value of each row.

    Raises:
        OSError: the disk is full or read-only.
    """
    with replacing(path) as partial:
        partial.touch(0o600)
        with _Sink(partial.open("r+b", buffering=0)) as sink:
            _write(sink, schema.with_metadata({"key": key}), rows)
            sink.write(sink.digest.digest())
            found = Columns(sink.content())
    return found


def stored(schema: pa.Schema, rows: Iterable[Row], folder: Path | None) -> Columns:
    """Return rows as columns in a file without a name, which is gone with the process.

    Args:
        schema: names and types of the columns.
        rows: column -> value of each row.
        folder: folder of the file; where it is None or its disk takes no more, the rows are in memory.
    """
    with _Sink(_unnamed(folder), spare=True) as sink:
        _write(sink, schema, rows)
        return Columns(sink.content())


def _unnamed(folder: Path | None) -> IO[bytes]:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return tempfile.TemporaryFile(dir=folder, buffering=0)
    except OSError:
        pass
    return io.BytesIO()


def _write(sink: _Sink, schema: pa.Schema, rows: Iterable[Row]) -> None:
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batched(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def _mapped(file: IO[bytes]) -> Any:
    return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Sink(io.RawIOBase):
    """A file that is written from its start, and the digest of its content."""

    def __init__(self, file: IO[bytes], *, spare: bool = False) -> None:
        """Write to an unbuffered file; with `spare`, what it does not take goes to memory, with all before."""
        self._file, self._spare, self._written = file, spare, 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        """Return that bytes can be written."""
        return True

    def write(self, content: Any) -> int:
        """Write all of some bytes."""
        rest = memoryview(content).cast("B")
        size = len(rest)
        self.digest.update(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            if not self._spare:
                raise
            with self._file as full:
                full.seek(0)
                self._file = io.BytesIO(full.read(self._written))
            self._file.seek(self._written)
            self._file.write(content)
        self._written += size
        return size

    def content(self) -> Any:
        """Return the written bytes as a buffer, mapped from the file or in memory; it outlives the file."""
        file = self._file
        return pa.py_buffer(file.getvalue()) if isinstance(file, io.BytesIO) else _mapped(file)

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()
