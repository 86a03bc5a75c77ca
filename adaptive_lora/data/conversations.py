"""Examples from conversations and from plain text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from adaptive_lora.data.examples import Example, content_id
from adaptive_lora.data.reading import Table
from adaptive_lora.data.row_files import parse_json
from adaptive_lora.data.rows import BadRow, refuse_unread, required_text, text_of
from adaptive_lora.errors import DataError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS, TEXT = ("messages", "conversations", "conversation"), "text"
"""Columns of conversations, of which the first present is read, and the column of plain text."""
CHAT: Mapping[str, str] = {
    "with_input": "{prompt}\n\n{input}",
    "without_input": "{prompt}",
    "chat": "the tokenizer's own",
}
"""Prompt template of conversations: the user's text alone, to which the tokenizer's chat template is applied."""
PLAIN: Mapping[str, str] = {"with_input": "{prompt}{input}", "without_input": "{prompt}"}
ASSISTANT = "assistant"
_SPEAKERS: Mapping[str, str] = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "assistant": ASSISTANT,
    "model": ASSISTANT, "bot": ASSISTANT, "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""ShareGPT's `from` -> role."""
_LEARNED = ("weight", "train", "training", "loss")
"""Keys of a message that say whether the loss includes it: 0 or 1, or false or true."""
_REFUSED = (
    "function_call", "train_detail", "training_detail", "loss_mask", "loss_scale", "loss_weight",
    "mask", "masked", "image", "images", "video", "videos", "audio", "audios",
)  # fmt: skip
"""Keys of a message that would change prompt or loss and are not supported."""
_USUAL_ROLES = frozenset({"system", "developer", "user", ASSISTANT, "tool"})
_WRITTEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that the chat template must render."""


class Conversations:
    """Reader of conversations, row by row, with counts of keys and roles beyond the usual."""

    def __init__(self, table: Table, column: str) -> None:
        """Start the counts for a table and its column of messages."""
        self._table, self._column = table, column
        self._seen: dict[str, int] = {}
        self._keys: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._unlearned = self._unused = 0

    @property
    def columns(self) -> dict[str, str]:
        """Column -> its use."""
        used = {self._column: "conversation", "system": "first message", "tools": "tools"}
        return {name: role for name, role in used.items() if name in self._table.columns}

    def notes(self) -> list[str]:
        """Return sentences on further keys, on other roles and on answers excluded from the loss."""
        keys = ", ".join(f"{key} ({count:,})" for key, count in sorted(self._keys.items()))
        said = [f"further keys of messages, given to the chat template: {keys}"] if keys else []
        if self._unlearned:
            said.append(
                f"{self._unlearned:,} answers are read, not learned (weight 0, train false, or "
                "before the first question)"
            )
        if self._unused:
            said.append(f"{self._unused:,} messages after the last answer that is learned are not used")
        if self._roles:
            roles = ", ".join(f"{role} ({count:,})" for role, count in sorted(self._roles.items()))
            said.append(f"other roles, read as the chat template writes them: {roles:.200}")
        return said

    def example(self, index: int) -> Example:
        """Return the example of a row: {role, content} or {from, value} in order.

        Messages after the last supervised answer are left out.

        Raises:
            BadRow: the row is not a conversation, or has unsupported keys.
        """
        row, where = self._table.rows[index], self._table.where(index)
        refuse_unread(row, self.columns, where)
        read = [_message(item, where) for item in self._items(row, where)]
        system = text_of(row, "system", where)
        if system.strip():
            if read[0][0]["role"] == "system":
                raise BadRow(where, "has a column 'system' and a message of that role; required one")
            read.insert(0, ({"role": "system", "content": system}, None))
        messages, unlearned = _up_to_last_answer(read, where)
        pairs = tuple((str(m["role"]), str(m.get("content") or "")) for m in messages)
        _require_usable_texts(pairs, where)
        further = Counter(key for m in messages for key in m if key not in ("role", "content"))
        whole = bool(further) or any(not isinstance(m.get("content"), str) for m in messages)
        self._keys.update(further)
        self._unlearned += len(unlearned)
        self._unused += len(read) - len(messages)
        self._roles.update(role for role, _ in pairs if role not in _USUAL_ROLES)
        tools = _tools(row.get("tools"), where)
        prompt = "\n".join(f"{role}: {text}" for role, text in pairs[:-1])
        named = prompt + ("" if not tools else f"\n{tools}")
        return Example(
            id=content_id(named, pairs[-1][1], self._seen),
            prompt=prompt,
            response=pairs[-1][1],
            where=where,
            messages=pairs,
            full_messages=_json(messages, where) if whole else "",
            unlearned=unlearned,
            tools=tools,
        )

    def _items(self, row: Mapping[str, Any], where: str) -> Sequence[Any]:
        value = row.get(self._column)
        if not isinstance(value, list | tuple) or not value:
            raise _no_conversation(where, value)
        return value


def _no_conversation(where: str, got: object) -> BadRow:
    return BadRow(
        where,
        f"messages: required a list of {{role, content}} texts; got {got!r:.60}",
        reason="no list of {role, content} texts",
    )


def _require_usable_texts(pairs: Sequence[tuple[str, str]], where: str) -> None:
    for role, content in pairs:
        text_of({"content": role + content}, "content", where)


def _message(item: Any, where: str) -> tuple[dict[str, Any], bool | None]:
    """Return a message in a chat template's form, and its own mark as supervised or not, or None.

    Raises:
        BadRow: the item is not a message, or one of its keys is not supported.
    """
    if not isinstance(item, dict) or ({"from", "value"} & set(item) and {"role", "content"} & set(item)):
        raise _no_conversation(where, item)
    if "from" in item and "value" in item:
        role = _SPEAKERS.get(str(item["from"]))
        if role is None:
            raise BadRow(
                where,
                f"'from' must be one of {', '.join(_SPEAKERS)}; got {item['from']!r:.60}",
                reason="unknown 'from' of a message",
            )
        rest = {key: value for key, value in item.items() if key not in ("from", "value")}
        item = {"role": role, "content": item["value"], **rest}
    role, content = item.get("role"), item.get("content")
    silent = content is None and bool(item.get("tool_calls"))
    if not isinstance(role, str) or not role.strip() or not (isinstance(content, str) or silent):
        raise _no_conversation(where, item)
    if role != ASSISTANT and _SPEAKERS.get(role.strip().lower()) == ASSISTANT:
        raise BadRow(
            where,
            f"the role '{role:.40}' would be read, not learned; required '{ASSISTANT}' for answers",
            reason="an answer whose role is not 'assistant'",
        )
    for key in _REFUSED:
        if item.get(key) not in (None, "", [], {}):
            raise BadRow(where, f"the key '{key}' of a message is not read; drop it")
    said = {key: _learned(item[key], key, role, where) for key in _LEARNED if key in item}
    learned = {each for each in said.values() if each is not None}
    if len(learned) > 1:
        raise BadRow(where, f"{' and '.join(said)} of a message say different things; required one")
    given = {key: value for key, value in item.items() if key not in (*_LEARNED, *_REFUSED)}
    return given, next(iter(learned), None)


def _learned(value: Any, key: str, role: str, where: str) -> bool | None:
    if value is None:
        return None
    if isinstance(value, str) or value not in (0, 1):
        raise BadRow(
            where,
            f"'{key}' of a message must be 0 or 1, false or true; got {value!r:.40}",
            reason=f"'{key}' of a message is neither 0 nor 1",
        )
    if value and role != ASSISTANT:
        raise BadRow(where, f"'{key}' asks to learn a message of the role '{role:.40}'; only the "
                     f"role '{ASSISTANT}' is learned")  # fmt: skip
    return bool(value)


def _up_to_last_answer(
    read: list[tuple[dict[str, Any], bool | None]], where: str
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Return the messages up to the last supervised answer, and the indices of unsupervised answers.

    Unsupervised are answers marked so, and messages of the assistant before the first one of
    another role than the system: no prompt in serving ends there.
    """
    answers = [i for i, (message, _) in enumerate(read) if message["role"] == ASSISTANT]
    opening = next((i for i, (m, _) in enumerate(read) if m["role"] not in (ASSISTANT, "system")), len(read))
    unlearned = [i for i in answers if read[i][1] is False or i < opening]
    learned = [i for i in answers if i not in unlearned]
    if not learned and answers and answers[-1] > 0 and read[answers[-1]][1] is not False:
        learned = [answers[-1]]  # an answer to the system's message
    if not answers:
        raise BadRow(where, f"required an answer of the role '{ASSISTANT}'; found none")
    if not learned:
        raise BadRow(where, "required an answer that is learned: all have weight 0 or train false, "
                     "or nothing stands before them")  # fmt: skip
    last = learned[-1]
    for index in learned:
        message = read[index][0]
        if not str(message.get("content") or "").strip() and not message.get("tool_calls"):
            raise BadRow(where, f"message {index}: an answer of the role '{ASSISTANT}' is empty",
                         reason=f"an answer of the role '{ASSISTANT}' is empty")  # fmt: skip
    return [m for m, _ in read[: last + 1]], tuple(i for i in unlearned if i < last)


def _tools(value: Any, where: str) -> str:
    """Return a row's tools, a list of objects or its JSON text, as JSON text."""
    if isinstance(value, str) and value.strip():
        with suppress(ValueError):
            value = parse_json(value)
    if value in (None, "", []) or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(
            where,
            f"column 'tools' must be a list of objects, or its JSON text; got {value!r:.60}",
            reason="column 'tools' is no list of objects",
        )
    return _json(value, where)


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(where, f"holds what JSON has not: {error}") from error


def plain_text(table: Table, index: int, seen: dict[str, int]) -> Example:
    """Return the example of a row with plain text: no prompt, and all tokens are supervised.

    Raises:
        BadRow: the row has no text.
    """
    where = table.where(index)
    refuse_unread(table.rows[index], (TEXT,), where)
    text = required_text(table.rows[index], TEXT, where)
    return Example(id=content_id("", text, seen), prompt="", response=text, where=where)


def turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield the segments of a conversation rendered by the tokenizer's chat template: (text, is an answer).

    An answer is the text that the template adds after the earlier messages and the generation
    prompt: the content and the end-of-turn token. Its boundary is therefore where generation
    starts. Unsupervised answers belong to the context of the next one.

    Raises:
        DataError: there is no template, or it refuses the roles, or it renders earlier turns differently.
    """
    require_written(example, tokenizer)
    done = ""
    for index, (role, content) in enumerate(example.messages):
        if role != ASSISTANT or index in example.unlearned:
            continue
        before = _rendered(example, tokenizer, example.messages[:index], prompt=True)
        after = _rendered(example, tokenizer, example.messages[: index + 1], prompt=False)
        if not before.startswith(done) or not after.startswith(before) or after == before:
            raise _no_boundary(example.where, f"message {index}", done, before, after)
        if _without_blanks(content) not in _without_blanks(after[len(before) :]):
            raise BadRow(
                example.where,
                f"message {index}: the tokenizer's chat template does not write the answer as it "
                f"is given: {content!r:.80} becomes {after[len(before) :]!r:.80}. Templates of "
                "reasoning models leave the reasoning out; required one that writes answers "
                "whole, or answers as it writes them",
                reason="the chat template does not write an answer as it is given",
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _no_boundary(where: str, message: str, done: str, before: str, after: str) -> DataError:
    """Return the error for an answer that does not begin where its generation prompt ends.

    Args:
        where: place of the row.
        message: position of the answer among the messages, as text.
        done: the rendered messages up to the previous answer.
        before: the rendered messages before the answer, with the generation prompt.
        after: the rendered messages including the answer.

    Returns:
        An error of the row; an error of the whole data set where the template's generation prompt,
        which is the same for every row, is not how answers begin.
    """
    asked = before[len(commonprefix([before, after])) :]  # noqa: RUF071 - a prefix of characters
    answered = after[len(before) - len(asked) :]
    if before.startswith(done) and 0 < len(asked) < len(before) - len(done):
        return DataError(
            f"the tokenizer's chat template ends the prompt for an answer in {asked!r:.80}, but "
            f"writes an answer as {answered!r:.80} ({where}, {message}), without that: a model "
            "would be asked in another way than it learned. Required a template "
            "(chat_template.jinja, or in tokenizer_config.json) whose prompt ends where its "
            "answers begin: take that text out of the prompt, for training and serving, or have "
            "the template write it before every answer."
        )
    return BadRow(
        where,
        f"{message}: the tokenizer's chat template does not continue what it wrote for the "
        "messages before, so that the answer has no boundary: it renders earlier turns differently, or "
        "nothing for the answer. Required a template that leaves earlier turns as they are, or "
        "conversations of one answer",
        reason="the chat template gives an answer no boundary",
    )


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def _rendered(
    example: Example, tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], *, prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{example.where} is a conversation, but the base's tokenizer has no chat template; "
            "required one (tokenizer_config.json, chat_template.jinja, or in a GGUF file), or "
            "columns of instruction and response."
        )
    try:
        text = tokenizer.apply_chat_template(
            example.chat(len(messages)), tools=example.tool_list, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template in the sandbox can fail in any way
        raise BadRow(
            example.where,
            f"the tokenizer's chat template refuses the conversation: {brief(error)}",
            reason="the chat template refuses the conversation",
        ) from error
    return str(text)


def require_written(example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a conversation whose tools or tool calls the chat template does not render.

    Raises:
        BadRow: the rendered text lacks them; the message names which.
    """
    if not example.chat_text:
        return
    messages = example.chat(len(example.messages))

    def shown(listed: list[dict[str, Any]], tools: list[Any] | None) -> str:
        return str(tokenizer.apply_chat_template(listed, tools=tools, tokenize=False))

    whole = _rendered(example, tokenizer, example.messages, prompt=False)
    missing = []
    if example.tools:
        with suppress(Exception):  # a template that fails without it uses it
            missing += ["tools"] if shown(messages, None) == whole else []
    for key in _WRITTEN:
        if any(message.get(key) for message in messages):
            bare = [{k: v for k, v in message.items() if k != key} for message in messages]
            with suppress(Exception):
                missing += [key] if shown(bare, example.tool_list) == whole else []
    if missing:
        raise BadRow(
            example.where,
            f"the tokenizer's chat template does not write {' and '.join(missing)}; required a "
            "base whose template does, or rows without",
            reason=f"the chat template does not write {' and '.join(missing)}",
        )
