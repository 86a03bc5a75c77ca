"""What a report says beside the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """The study that a report is about."""

    title: str
    examples: Mapping[str, str] = field(default_factory=dict)
    """Example id -> text of the prompt, for the most changed examples."""
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Study id -> how its data were read, as lines for people."""
