"""Rows that are no prompt and response: conversations, and plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptive_lora.data.examples import Example, content_id
from adaptive_lora.data.reading import Table
from adaptive_lora.errors import DataError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES, TEXT = "messages", "text"
"""Columns of conversations and of plain text."""
CHAT: Mapping[str, str] = {
    "with_input": "{prompt}\n\n{input}",
    "without_input": "{prompt}",
    "chat": "the tokenizer's own",
}
"""Template of conversations: what the user says; the tokenizer's chat template goes around it."""
PLAIN: Mapping[str, str] = {"with_input": "{prompt}{input}", "without_input": "{prompt}"}
ASSISTANT = "assistant"


def conversations(table: Table) -> tuple[Example, ...]:
    """Return the examples of rows with `messages`: {role, content} in order.

    What follows the last turn of the assistant is left out.

    Raises:
        DataError: a row is no conversation; names it.
    """
    seen: dict[str, int] = {}
    found = []
    for index, row in enumerate(table.rows):
        where = table.where(index)
        messages = _messages(row.get(MESSAGES), where)
        *before, (_, response) = messages
        prompt = "\n".join(f"{role}: {text}" for role, text in before)
        found.append(
            Example(
                id=content_id(prompt, response, seen),
                prompt=prompt,
                response=response,
                where=where,
                messages=messages,
            )
        )
    return tuple(found)


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Return (role, content) of each message up to the assistant's last one."""
    wanted = f"{where}: column '{MESSAGES}': required a list of {{role, content}} texts"
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{wanted}; got {value!r:.60}.")
    messages = []
    for item in value:
        role, content = (item.get(k) if isinstance(item, dict) else 0 for k in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str) or not role.strip():
            raise DataError(f"{wanted}; got {item!r:.60}.")
        messages.append((role, content))
    while messages and messages[-1][0] != ASSISTANT:
        messages.pop()
    if not messages or not messages[-1][1].strip():
        raise DataError(f"{wanted} with an answer of the role '{ASSISTANT}'; found none.")
    return tuple(messages)


def plain_texts(table: Table) -> tuple[Example, ...]:
    """Return the examples of rows with a `text`: no prompt, all of it is learned.

    Raises:
        DataError: a row has none; names it.
    """
    seen: dict[str, int] = {}
    found = []
    for index, row in enumerate(table.rows):
        text, where = row.get(TEXT), table.where(index)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: column '{TEXT}': required a text; got {text!r:.60}.")
        found.append(Example(id=content_id("", text, seen), prompt="", response=text, where=where))
    return tuple(found)


def turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a conversation by the tokenizer's chat template: (text, is an answer).

    A turn of the assistant is what the template adds to all that stands before it and the prompt
    for an answer: the content, and the sign that ends the turn. So the boundary is the one at which
    generation starts.

    Raises:
        DataError: no template, one that refuses the roles, or one that writes earlier turns anew.
    """
    done = ""
    for index, (role, _) in enumerate(example.messages):
        if role != ASSISTANT:
            continue
        before = _rendered(example, tokenizer, example.messages[:index], prompt=True)
        after = _rendered(example, tokenizer, example.messages[: index + 1], prompt=False)
        if not (before.startswith(done) and after.startswith(before) and after != before):
            raise DataError(
                f"{example.where}: the tokenizer's chat template does not continue what it wrote "
                f"for the messages before message {index}, so that its answer has no boundary; "
                "required a template that leaves earlier turns as they are."
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _rendered(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[tuple[str, str]],
    *,
    prompt: bool,
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{example.where} is a conversation, but the base's tokenizer has no chat template; "
            "required one (tokenizer_config.json, chat_template.jinja, or in a GGUF file), or "
            "columns of instruction and response."
        )
    listed = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # transformers runs it in a sandbox; it can still fail in any way
        raise DataError(
            f"{example.where}: the tokenizer's chat template refuses the conversation: "
            f"{brief(error)}."
        ) from error
    return str(text)
