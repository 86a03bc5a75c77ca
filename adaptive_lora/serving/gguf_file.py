"""GGUF checkpoints: search for the file, check of its header, and its form for transformers.

The header is read here without torch and without the tensors, so that an unusable file is refused
within a second. Layout: the GGUF specification, ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import importlib.util
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .safety import UnsafeFiles

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a metadata value -> format character of `struct`; 8 is a text, 9 a list."""
_TEXT, _LIST = 8, 9
_SPELLED = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2", "t5encoder": "t5",
}  # fmt: skip
"""Architecture name in GGUF files -> name in transformers' table, where they differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """Metadata and list of tensors at the start of a GGUF file."""

    metadata: Mapping[str, Any]
    """Key -> number or text; for a list, its length."""
    tensors: tuple[tuple[str, int, int, int], ...]
    """(name, number of elements, type number, offset in the data section in bytes) of each tensor."""
    data_start: int
    """Offset of the data section in the file, in bytes."""

    @property
    def stored_as(self) -> str:
        """Types of the tensors, by falling number of weights, such as `Q4_1, Q8_0, F32`."""
        from gguf import GGMLQuantizationType

        counts: Counter[int] = Counter()
        for _, elements, kind, _ in self.tensors:
            counts[kind] += elements
        return ", ".join(GGMLQuantizationType(kind).name for kind, _ in counts.most_common())


def gguf_in(place: Path) -> Path | None:
    """Return the GGUF file of a path: the path itself, or the only one in a folder without a model.

    Raises:
        UnsafeFiles: the folder has several.
    """
    if place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    found = sorted(path for path in place.glob("*.gguf") if path.is_file())
    if len(found) > 1:
        raise UnsafeFiles(
            f"{place} holds {len(found)} GGUF files ({', '.join(path.name for path in found[:5])}"
            f"{', ...' if len(found) > 5 else ''}); required one: give the path of the file."
        )
    return found[0] if found else None


def require_gguf(path: Path) -> GgufHeader:
    """Check a GGUF file before transformers sees it; return its header.

    Raises:
        UnsafeFiles: the file is not GGUF, corrupt, incomplete, or not supported by transformers.
        ImportError: the package gguf is missing.
    """
    header = read_header(path)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"{path} is read by the package gguf, which is not installed: pip install "
            "'adaptive-lora[gguf]' (or gguf alone, where an adapter is served)."
        )
    _require_architecture(path, header)
    missing = [
        key for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
        if key not in header.metadata
    ]  # fmt: skip
    if missing:
        raise UnsafeFiles(
            f"{path} holds no tokenizer ({', '.join(missing)}); required one inside the file: "
            "convert the model again with its vocabulary."
        )
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise UnsafeFiles(
            f"{path} is one of {parts} parts of a model; required one file: join them with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    _require_whole(path, header)
    return header


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF file's metadata and list of tensors.

    Raises:
        UnsafeFiles: the file is not GGUF, has an unknown version, or is corrupt before its tensors.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != _MAGIC:
            raise UnsafeFiles(
                f"{path} is no GGUF file: required the first bytes {_MAGIC!r}, got {start[:4]!r}. "
                "A base is a GGUF file, a model folder, a hub id or 'embedded'."
            )
        version = int.from_bytes(start[4:], "little")
        if len(start) == 8 and version not in _VERSIONS:
            raise UnsafeFiles(f"{path} is GGUF of version {version}; required version 2 or 3, little-endian.")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data).header()
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise UnsafeFiles(
                f"{path} is corrupt or truncated: its {path.stat().st_size:,} bytes end or are invalid "
                "before its tensors begin; download it again."
            ) from error


class _Cursor:
    """A reader with a position in a mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 8

    def header(self) -> GgufHeader:
        tensors, keys = self._take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text()
            metadata[name] = self._value(*self._take("I"))
        table = tuple(self._tensor() for _ in range(tensors))
        step = int(metadata.get("general.alignment", 32))
        return GgufHeader(metadata=metadata, tensors=table, data_start=-(-self._at // step) * step if step else 0)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError(f"a size of {size:,} bytes at {self._at:,}")
        self._at += size

    def _text(self) -> str:
        (size,) = self._take("Q")
        start = self._at
        self._skip(size)
        return self._data[start : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind in _FIXED:
            return self._take(_FIXED[kind])[0]
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            raise ValueError(f"a value of type {kind}")
        inner, count = self._take("IQ")
        if inner in _FIXED:
            self._skip(count * struct.calcsize(f"<{_FIXED[inner]}"))
        elif inner == _TEXT:
            for _ in range(count):
                self._skip(*self._take("Q"))
        else:
            raise ValueError(f"a list of values of type {inner}")
        return count

    def _tensor(self) -> tuple[str, int, int, int]:
        name = self._text()
        (sides,) = self._take("I")
        shape = self._take(f"{min(sides, 8)}Q")  # ggml has at most 4
        kind, offset = self._take("IQ")
        return name, prod(shape), kind, offset


def _require_architecture(path: Path, header: GgufHeader) -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    known = {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}
    name = header.metadata.get("general.architecture")
    if name not in known and _SPELLED.get(str(name)) not in known:
        readable = {*known, *_SPELLED} - set(_SPELLED.values())
        raise UnsafeFiles(
            f"{path} is of the architecture {name!r}, which transformers cannot read from GGUF; "
            f"it can read {', '.join(sorted(readable | {'t5'}))}. Give the model's own folder with "
            "config.json and *.safetensors."
        )


def _require_whole(path: Path, header: GgufHeader) -> None:
    """Check that all tensors are within the file, and that their types can be dequantised."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    end = header.data_start
    for kind in {kind for _, _, kind, _ in header.tensors}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]), np.uint8),
                       GGMLQuantizationType(kind))  # fmt: skip
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UnsafeFiles(
                f"{path} holds tensors of type {kind}, which the package gguf cannot dequantise "
                f"({error}); required one that it can, such as Q4_1, Q8_0 or F16."
            ) from error
    for _, elements, kind, offset in header.tensors:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = max(end, header.data_start + offset + elements // block * size)
    found = path.stat().st_size
    if not header.tensors or found < end:
        raise UnsafeFiles(
            f"{path} is truncated: its {len(header.tensors)} tensors end at byte {end:,}, the file "
            f"at {found:,}; download it again."
            if header.tensors
            else f"{path} holds no tensors (a vocabulary alone); required a whole model."
        )


@contextmanager
def as_transformers_reads(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (folder, further arguments of `from_pretrained`) for a model folder or a GGUF file.

    A GGUF file is given to transformers alone in a folder, because it would otherwise also read a
    tokenizer.json or adapter_config.json from the file's folder.
    """
    if not place.is_file():
        yield place, {}
        return
    # The progress bar of dequantised tensors cannot be switched off.
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        (Path(folder) / place.name).symlink_to(place.absolute())
        yield Path(folder), {"gguf_file": place.name}
