"""Tokens on disk: safetensors of flat integer arrays, written atomically and verified on reading.

A set of E examples has named columns, each with one sequence of integers per example. A column is
two arrays: the concatenated sequences, `NAME` (int32), and their offsets, `NAME.at` (E + 1).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adaptive_lora.interruption import replacing

Rows = Sequence[Mapping[str, Sequence[int]]]
"""Per example: name of a column -> its integers. All examples have the same columns."""
Arrays = dict[str, npt.NDArray[np.integer]]

SUFFIX = ".safetensors"
_AT = ".at"


class CorruptTokens(Exception):
    """A file's content differs from what was written."""


def write_rows(path: Path, key: str, rows: Rows) -> None:
    """Write a set of tokens atomically.

    Args:
        path: path of the file; an existing file is replaced atomically.
        key: hash of what the tokens were made from; `read_rows` requires the same.
        rows: tokens of at least one example.

    Raises:
        OSError: the disk is full or read-only.
    """
    arrays = _arrays(rows)
    content = save(arrays, {"key": key, "sha256": _digest(arrays)})
    with replacing(path) as partial:
        partial.touch(0o600)  # readable by this user alone
        partial.write_bytes(content)


def read_rows(path: Path, key: str, count: int) -> Rows:
    """Read a set of tokens written by `write_rows`.

    Args:
        path: path of the file.
        key: key that the file must have.
        count: number of examples that it must have.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptTokens: the content differs from what was written.
    """
    try:
        with safe_open(path, framework="np") as file:
            written = file.metadata() or {}
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError) as error:
        raise CorruptTokens(str(error)) from error
    if written.get("key") != key:
        raise CorruptTokens("it was made from something else")
    if written.get("sha256") != _digest(arrays):
        raise CorruptTokens("its content is not what was written")
    names = tuple(name for name in arrays if not name.endswith(_AT))
    columns = [_sequences(arrays[name], arrays[name + _AT]) for name in names]
    if {len(sequences) for sequences in columns} != {count}:
        raise CorruptTokens(f"it does not hold {count} examples")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _arrays(rows: Rows) -> Arrays:
    arrays: Arrays = {}
    for name in rows[0]:
        sequences = [row[name] for row in rows]
        ends = accumulate(map(len, sequences), initial=0)
        arrays[name] = np.fromiter(chain.from_iterable(sequences), dtype=np.int32)
        arrays[name + _AT] = np.fromiter(ends, dtype=np.int64)
    return arrays


def _sequences(values: npt.NDArray[np.integer], at: npt.NDArray[np.integer]) -> list[list[int]]:
    flat, ends = values.tolist(), at.tolist()
    return [flat[start:end] for start, end in pairwise(ends)]


def numbers_digest(rows: Iterable[Mapping[str, Sequence[int]]]) -> str:
    """Return a digest over the integers of all examples in order, 32 hexadecimal digits."""
    total = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            values = row[name]
            total.update(f"{name}\0{len(values)}\0".encode())
            total.update(struct.pack(f"<{len(values)}q", *values))
        total.update(b"\n")
    return total.hexdigest()[:32]


def _digest(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
