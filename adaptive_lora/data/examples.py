"""One example: a rendered prompt and its response."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptive_lora.data.rows import LeftOut, Reading
from adaptive_lora.data.sequences import Joined, Rows
from adaptive_lora.errors import DataError


@dataclass(frozen=True, slots=True)
class MediaFile:
    """An image or a recording, whose file is read when it is used; equal to another of equal content."""

    digest: bytes
    """SHA-256 of the file's content."""
    source: str | bytes = field(repr=False, compare=False)
    """Path of the file, or its content where the data have no file of its own."""

    def content(self) -> bytes:
        """Return the content of the file.

        Raises:
            DataError: the file is not the one that was read at the start.
        """
        if isinstance(self.source, bytes):
            return self.source
        try:
            found = Path(self.source).read_bytes()
        except OSError as error:
            raise DataError(f"file {self.source} cannot be read any more: {error.strerror}; put it back.") from error
        if hashlib.sha256(found).digest() != self.digest:
            raise DataError(f"file {self.source} changed since the data were read; put it back, or begin a new study.")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt as the model sees it, and its reference response."""

    id: str
    """Identifier derived from the content, with a count for repetitions; equal over runs and machines."""
    prompt: str
    response: str
    where: str
    """Place of the example, such as `alpaca.jsonl line 12`, for error messages."""
    second: str | None = None
    """Second text of a pair; None for other tasks."""
    target: float | None = None
    """Number to predict, a class index or a value; None for other tasks."""
    question: str | None = None
    """Question about the image; None for tasks without one."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each message of a conversation, `response` being the last; empty otherwise."""
    full_messages: str = ""
    """The messages as JSON text, where they have more keys than role and content; empty otherwise."""
    unlearned: tuple[int, ...] = ()
    """Indices of the assistant's messages that are context only, excluded from the loss."""
    tools: str = ""
    """Tools for the chat template, as JSON text; empty without tools."""
    media: MediaFile | None = None
    """Image or recording of the example; None for other tasks."""

    @property
    def image(self) -> bytes | None:
        """Content of the image file; None for tasks without images."""
        return None if self.media is None else self.media.content()

    def chat(self, count: int) -> list[dict[str, Any]]:
        """Return the first `count` messages of a conversation in a chat template's form."""
        if self.full_messages:
            listed: list[dict[str, Any]] = json.loads(self.full_messages)
            return listed[:count]
        return [{"role": role, "content": text} for role, text in self.messages[:count]]

    @property
    def shown(self) -> str:
        """All texts of the example for display: the rendered prompt, continued by its response."""
        others = (self.second, self.question, self.target, self.media, self.messages or None)
        if all(other is None for other in others):
            return f"{self.prompt}{self.response}"
        answer = f"{self.messages[-1][0]}: {self.response}" if self.messages else self.response
        texts = (self.prompt, self.second, self.question, answer)
        return "\n".join(text for text in texts if text)

    @property
    def tool_list(self) -> list[Any] | None:
        """Tools in a chat template's form; None without tools."""
        return json.loads(self.tools) if self.tools else None

    @property
    def chat_text(self) -> str:
        """Text of a conversation's keys other than role and content; empty without any."""
        more = (self.full_messages, self.unlearned, self.tools)
        return json.dumps(more) if any(more) else ""

    @property
    def prompt_key(self) -> bytes:
        """Digest by which prompts are equal: that of their texts without case and white space."""
        texts = (self.prompt or self.response, *filter(None, [self.second]))
        plain = "\0".join(" ".join(text.lower().split()) for text in texts)
        return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def content_id(prompt: str, response: str, seen: dict[str, int]) -> str:
    """Return 16 hexadecimal digits of the content; repetitions in `seen` get `-1`, `-2` ..."""
    key = hashlib.sha256(f"{prompt}\0{response}".encode()).hexdigest()[:16]
    count = seen.get(key, 0)
    seen[key] = count + 1
    return f"{key}-{count}" if count else key


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """All examples of a study, before they are split."""

    examples: Sequence[Example]
    template: Mapping[str, str]
    """The prompt template that rendered the examples, saved for serving."""
    source: str
    """Source of the examples: file name, hub id or `embedded`."""
    template_name: str = "none"
    """Name of the prompt template, for display."""
    readings: tuple[Reading, ...] = ()
    """Record of how the source was read, followed by that of a separate test source."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their indices; empty for tasks without classes."""
    test: Sequence[Example] | None = None
    """The test split, where it comes from a separate source; None otherwise."""

    @cached_property
    def every(self) -> Sequence[Example]:
        """All examples, followed by those of a separate test source."""
        return Joined(self.examples, self.test or ())

    @cached_property
    def prompt_keys(self) -> Sequence[bytes]:
        """Prompt key of each of all examples."""
        return [example.prompt_key for example in self.every]

    @cached_property
    def digest(self) -> str:
        """Digest over all prompts and responses in order, 32 hexadecimal digits (MLflow allows 36)."""
        total = hashlib.sha256()
        for example in self.every:
            more = (example.second, example.question, example.chat_text or None)
            further = "".join(f"{text}\0" for text in more if text is not None)
            total.update(f"{example.prompt}\0{further}{example.response}\0".encode())
        return total.hexdigest()[:32]

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> number of rows left out for it, over all sources."""
        return sum((reading.reasons for reading in self.readings), Counter())

    def without(self, reasons: Mapping[int, str]) -> ExampleSet:
        """Return the set without some examples, which are recorded as left out.

        Args:
            reasons: index of the example among all -> reason.

        Raises:
            DataError: no example is left.
        """
        kept: list[Rows[Example]] = []
        readings: list[Reading] = []
        start = 0
        parts = [self.examples] if self.test is None else [self.examples, self.test]
        for part, reading in zip(parts, self.readings, strict=True):
            end = start + len(part)
            kept.append(Rows(self.every, [index for index in range(start, end) if index not in reasons]))
            lost = [LeftOut(self.every[index].where, why) for index, why in reasons.items() if start <= index < end]
            readings.append(dataclasses.replace(reading, left_out=(*reading.left_out, *lost)))
            start = end
        if not all(kept):
            raise DataError(f"{self.source}: every row is left out: {', '.join(sorted(set(reasons.values())))}")
        test = kept[1] if len(kept) > 1 else None
        return dataclasses.replace(self, examples=kept[0], test=test, readings=tuple(readings))
