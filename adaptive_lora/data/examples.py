"""One example: a rendered prompt and its response."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt as the model sees it, and what it should answer."""

    id: str
    """Stable over runs and machines: derived from content, with a count for repetitions."""
    prompt: str
    response: str
    where: str
    """Where it stands, such as `alpaca.json item 12`, for error messages."""
    second: str | None = None
    """The second text, of tasks about pairs."""
    target: float | None = None
    """The number to predict: index of a class, or a value; of tasks that have one."""
    question: str | None = None
    """What is asked about the image, of tasks that ask."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of a conversation, of which `response` is the last; else empty."""
    image: bytes | None = field(default=None, repr=False)
    """The picture as its file holds it, of tasks that have one."""


def content_id(prompt: str, response: str, seen: dict[str, int]) -> str:
    """Return 16 hexadecimal digits of the content; repetitions in `seen` get `-1`, `-2` ..."""
    key = hashlib.sha256(f"{prompt}\0{response}".encode()).hexdigest()[:16]
    count = seen.get(key, 0)
    seen[key] = count + 1
    return f"{key}-{count}" if count else key


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSet:
    """All examples of a study, before they are divided."""

    examples: tuple[Example, ...]
    template: Mapping[str, str]
    """The prompt template that rendered them, kept for serving."""
    source: str
    """File name, hub id or `embedded`."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their indices, of tasks that have them."""
    test: tuple[Example, ...] | None = None
    """The test part, where it comes from a file of its own."""

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over all prompts and responses in order (MLflow allows 36)."""
        total = hashlib.sha256()
        for example in (*self.examples, *(self.test or ())):
            further = "".join(f"{t}\0" for t in (example.second, example.question) if t is not None)
            total.update(f"{example.prompt}\0{further}{example.response}\0".encode())
        return total.hexdigest()[:32]
