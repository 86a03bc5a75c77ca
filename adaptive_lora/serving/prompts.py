"""Prompts of served rows, as text and as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .text import render
from .tokens import prompt_ids

LISTS = ("messages", "tools")
"""Columns of lists; other columns are text."""
_BESIDE = {"input": "instruction", "tools": "messages"}
"""Column that is only allowed with another one -> that column."""

Row = Mapping[str, Any]


def prompt_of(record: Mapping[str, Any], row: Row, where: str) -> str:
    """Return the prompt of a row of {prompt} (verbatim) or {instruction, input} (by the template).

    Raises:
        ValueError: the row has neither, or both.
    """
    if _asking(row, ("prompt", "instruction"), where) == "prompt":
        return text_in(row, "prompt", where)
    asked, shown = text_in(row, "instruction", where), text_in(row, "input", where)
    return render(record["template"], asked, shown)


def text_in(row: Row, column: str, where: str) -> str:
    """Return a text of a row; empty if there is none.

    Raises:
        ValueError: it is a list or another object, whose Python form would become the prompt.
    """
    value = row.get(column)
    if isinstance(value, Iterable) and not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{where}: column '{column}' must be text, got {kind}; give a list of rows, one for each text")
    return "" if value is None else str(value)


def asked_ids(tokenizer: Any, record: Mapping[str, Any], row: Row, where: str) -> list[int]:
    """Return the token ids of a row's prompt, up to the answer.

    Args:
        tokenizer: tokenizer of the model.
        record: record of the adapter.
        row: {prompt}, {instruction, input}, or a conversation as {messages, tools}.
        where: place of the row, for error messages.

    Raises:
        ValueError: the row is not a valid request.
    """
    way = _asking(row, ("prompt", "instruction", "messages"), where)
    if way == "messages":
        return _chat_ids(tokenizer, _messages(row["messages"], where), _tools(row, where), where)
    text, by_chat = prompt_of(record, row, where), "chat" in record["template"]
    if way == "instruction" and by_chat:
        return _chat_ids(tokenizer, [{"role": "user", "content": text}], None, where)
    return prompt_ids(tokenizer, [text], special_tokens=not by_chat)[0]


def _asking(row: Row, ways: Sequence[str], where: str) -> str:
    """Return the one column with the prompt of a row."""
    given = [name for name in (*ways, *_BESIDE) if _is_given(row.get(name))]
    asked = [name for name in given if name in ways]
    if len(asked) != 1 or any(_BESIDE.get(name, asked[0]) != asked[0] for name in given):
        beside = [f"{name} only beside {by}" for name, by in _BESIDE.items() if by in ways]
        found = sorted(str(name) for name, value in row.items() if _is_given(value))
        raise ValueError(
            f"{where}: required one of the columns {', '.join(ways)}, and {', '.join(beside)}; got "
            f"{', '.join(found) or 'none'}"
        )
    return asked[0]


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation that ends before an answer."""
    wanted = f"{where}: column 'messages': required a list of {{role, content}} texts"
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    listed = [*value] if is_list else []
    if not listed:
        raise ValueError(f"{wanted}; got {value!r:.60}")
    for item in listed:
        is_message = isinstance(item, Mapping) and set(item) == {"role", "content"}
        if not is_message or not all(isinstance(text, str) for text in item.values()):
            raise ValueError(f"{wanted}; got {item!r:.60}")
    if listed[-1]["role"] == "assistant":
        raise ValueError(f"{wanted} that ends before an answer; the last is the assistant's own")
    return [dict(item) for item in listed]


def _tools(row: Row, where: str) -> list[Any] | None:
    """Return the descriptions of tools that the model may call, from a list or its JSON text."""
    value: Any = row.get("tools")
    if not _is_given(value):
        return None
    try:
        listed = json.loads(value) if isinstance(value, str) else [*value]
    except (TypeError, ValueError):
        listed = None
    if not isinstance(listed, list):
        raise ValueError(f"{where}: column 'tools': required a list, or its JSON; got {value!r:.60}")
    return listed or None


def _chat_ids(tokenizer: Any, messages: Sequence[Row], tools: list[Any] | None, where: str) -> list[int]:
    """Return the token ids of a conversation by the tokenizer's chat template, up to the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: the base's tokenizer has no chat template for a conversation; ask with 'prompt' or 'instruction'"
        )

    def shown(used: list[Any] | None) -> str:
        text = tokenizer.apply_chat_template(messages, tools=used, tokenize=False, add_generation_prompt=True)
        return str(text)

    try:
        text = shown(tools)
        ignored = tools is not None and text == shown(None)
    except Exception as error:  # a template in the sandbox can fail in any way
        raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from error
    if ignored:
        raise ValueError(f"{where}: the base's chat template does not write 'tools'; leave them out")
    return prompt_ids(tokenizer, [text], special_tokens=False)[0]
