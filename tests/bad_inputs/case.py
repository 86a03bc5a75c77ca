"""One bad input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Files to write, a command to run, and what its message has to say."""

    name: str
    words: tuple[str, ...]
    """Of the command line; `BASE` stands for a model folder that is right."""
    says: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Path in the working folder -> content."""


def in_file(table: Mapping[str, tuple[str | bytes, str]], kind: str, path: str, *words: str) -> tuple[Bad, ...]:
    """Return a case for every (content, message) of a table, written to one path."""
    return tuple(
        Bad(
            name=f"{kind}: {name}",
            words=words,
            says=says,
            files={path: content if isinstance(content, bytes) else content.encode()},
        )
        for name, (content, says) in table.items()
    )


def spoken(table: Mapping[str, tuple[tuple[str, ...], str]], kind: str) -> tuple[Bad, ...]:
    """Return a case for every (words, message) of a table."""
    return tuple(Bad(name=f"{kind}: {name}", words=words, says=says) for name, (words, says) in table.items())
