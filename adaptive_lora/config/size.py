"""Memory sizes as text, such as 6GiB."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


class MemorySize(int):
    """Bytes, read from a number or a text such as 6GiB, 500 MB or 8g (1 GB is 1,000 MB)."""

    def __new__(cls, value: object) -> MemorySize:
        """Read a size.

        Raises:
            ValueError: the text is not a size.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        if not found or isinstance(value, bool):
            raise ValueError(f"expected a size such as 6GiB or 800MB, got {value!r}")
        number, unit = found.groups()
        return super().__new__(cls, float(number) * _UNITS[unit or ""])


def shown(count: float) -> str:
    """Return a number of bytes as text, such as `6.43 GiB`."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if count >= _UNITS[unit.lower()]:
            return f"{count / _UNITS[unit.lower()]:.3g} {unit}B"
    return f"{count:.0f} B"
