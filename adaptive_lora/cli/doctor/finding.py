"""One line of the diagnosis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    status: str
    """ok, warn or fail."""
    text: str


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check=check, status="ok", text=text)


def warn(check: str, text: str) -> Finding:
    """Return a finding with which a study runs, perhaps not as wished."""
    return Finding(check=check, status="warn", text=text)


def fail(check: str, text: str) -> Finding:
    """Return a finding with which no study runs."""
    return Finding(check=check, status="fail", text=text)
