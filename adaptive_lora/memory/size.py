"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SIZE = r"\d+(\.\d+)?\s*([kmgtKMGT][iI]?)?[bB]?"
"""Regular expression of a size such as 6GiB, 500 MB or 8g."""


def parse_size(text: str) -> int:
    """Return bytes; GB counts in thousands and GiB in 1,024s.

    Raises:
        ValueError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not found:
        raise ValueError(f"expected a size such as 6GiB or 800MB, got {text!r}")
    number, unit = found.groups()
    return int(float(number) * {**_UNITS, **_BINARY}[unit or ""])


def shown(count: float) -> str:
    """Return bytes for people, such as `6.43 GiB`."""
    for unit, size in reversed(_BINARY.items()):
        if count >= size:
            return f"{count / size:.3g} {unit.capitalize()}B"
    return f"{count:.0f} B"
