"""Answers of a served adapter, one function per task, and the prompts of its rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

from .audio import open_recording, transcribe
from .images import answer_questions, pair_inputs
from .text import free_positions, generate, generate_targets, render
from .tokens import known_ids, prompt_ids, unknown_ids
from .words import encode_words

Loaded = tuple[Any, Any, Mapping[str, Any]]
"""Adapted model, processor, record."""
Rows = Sequence[Mapping[str, Any]]
LISTS = ("messages", "tools")
"""Columns of lists; other columns are text."""
_BESIDE = {"input": "instruction", "tools": "messages"}
"""Column that is only allowed with another one -> that column."""
_BATCH = 32
_LONGEST_PATH = 4096
"""Number of characters from which a text is no path."""


def autocast(loaded: Loaded) -> AbstractContextManager[Any]:
    """Return the autocast context for float32 heads on bases of lower precision; empty in float32."""
    import torch

    model, _, record = loaded
    dtype = getattr(torch, record["dtype"])
    low = dtype is not torch.float32
    return torch.autocast(model.device.type, dtype=dtype if low else None, enabled=low)


def continue_prompts(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the continuations of prompts."""
    model, tokenizer, record = loaded
    asked = [asked_ids(tokenizer, record, row, f"row {i}") for i, row in enumerate(rows)]
    most = free_positions(model)
    for index, ids in enumerate(asked):
        if len(ids) >= most:
            raise ValueError(
                f"row {index}: its prompt takes {len(ids)} tokens; the model has positions for "
                f"{most}, the answer included"
            )
    _require_known(model, tokenizer, asked)
    return generate(model, tokenizer, asked, max_new_tokens=max_new_tokens)


def _require_known(model: Any, tokenizer: Any, ids: Iterable[Sequence[int]]) -> None:
    problem = unknown_ids(tokenizer, ids, known_ids(model))
    if problem is not None:
        raise ValueError(f"a text cannot be run: {problem}")


def _outputs(loaded: Loaded, rows: Rows) -> list[list[float]]:
    """Return the outputs of a classification or regression head for rows of {text, second}."""
    import torch

    model, tokenizer, record = loaded
    found: list[list[float]] = []
    if 0 < sum(bool(row.get("second")) for row in rows) < len(rows):
        raise ValueError("required a column 'second' in all rows, or in none")
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        places = [f"row {start + index}" for index in range(len(part))]
        second = [_required(row, "second", at) for row, at in zip(part, places, strict=True) if row.get("second")]
        inputs = tokenizer(
            [_required(row, "text", at) for row, at in zip(part, places, strict=True)],
            second or None,
            truncation=True,
            max_length=record["task"]["max_tokens"],
            padding=True,
            return_tensors="pt",
        )
        _require_known(model, tokenizer, inputs["input_ids"].tolist())
        inputs = inputs.to(model.device)
        with torch.no_grad():
            found += model(**inputs).logits.float().tolist()
    return found


def classify_texts(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the class of each text."""
    labels = loaded[2]["task"]["labels"]
    return [labels[_largest(scores)] for scores in _outputs(loaded, rows)]


def tag_words(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the tags of each text's words, joined by blanks; words are what white space separates.

    Raises:
        ValueError: a text is longer than the model was trained with, or a word has no token of its own.
    """
    import torch

    model, tokenizer, record = loaded
    labels, found = record["task"]["labels"], []
    for index, row in enumerate(rows):
        words = _required(row, "text", f"row {index}").split()
        (encoded,) = encode_words(tokenizer, [words], record["task"]["max_tokens"])
        if encoded.lost:
            raise ValueError(f"row {index}: its text is {encoded.lost} tokens too long; cut it into sentences")
        _require_known(model, tokenizer, [encoded.ids])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.ids], device=model.device)).logits[0, encoded.places]
        found.append(" ".join(labels[_largest(scores)] for scores in logits.float().tolist()))
    return found


def estimate_numbers(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[float]:
    """Return the number of each text."""
    return [scores[0] for scores in _outputs(loaded, rows)]


def write_targets(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the target text of each prompt."""
    model, tokenizer, record = loaded
    most = record["task"]["max_tokens"]
    inputs = [
        tokenizer(text, truncation=True, max_length=most)["input_ids"]
        for text in (prompt_of(record, row, f"row {i}") for i, row in enumerate(rows))
    ]
    _require_known(model, tokenizer, inputs)
    return generate_targets(model, tokenizer, inputs, max_new_tokens=max_new_tokens)


def classify_images(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the class of each image."""
    import torch

    model, processor, record = loaded
    labels, found = record["task"]["labels"], []
    for start in range(0, len(rows), _BATCH):
        part = enumerate(rows[start : start + _BATCH], start)
        images = [_file(row, "image", f"row {index}", open_image) for index, row in part]
        inputs = processor(images=images, return_tensors="pt")
        with torch.no_grad():
            logits = model(pixel_values=inputs["pixel_values"].to(model.device)).logits
        found += [labels[_largest(scores)] for scores in logits.float().tolist()]
    return found


def compare_images(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[float]:
    """Return the cosine similarity of each row's image and text."""
    import torch

    model, processor, record = loaded
    found: list[float] = []
    for index, row in enumerate(rows):
        where = f"row {index}"
        texts, image = [_required(row, "text", where)], _file(row, "image", where, open_image)
        ids = processor.tokenizer(texts, truncation=True, max_length=record["task"]["max_tokens"])["input_ids"]
        inputs = pair_inputs(model.config, processor, ids, [image])
        with torch.no_grad():
            output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        found.append(float((output.image_embeds.float() * output.text_embeds.float()).sum()))
    return found


def describe_images(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the answer to a question on each image."""
    model, processor, _ = loaded
    asked = [
        (_required(row, "question", f"row {index}"), _file(row, "image", f"row {index}", open_image))
        for index, row in enumerate(rows)
    ]
    return answer_questions(model, processor, asked, max_new_tokens=max_new_tokens)


def write_transcripts(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the transcript of each recording.

    Raises:
        ValueError: a row holds no recording, or one longer than the base hears.
    """
    model, processor, _ = loaded
    recordings = [_file(row, "audio", f"row {index}", open_recording) for index, row in enumerate(rows)]
    return transcribe(model, processor, recordings, max_new_tokens=max_new_tokens)


def _largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index])


def _required(row: Mapping[str, Any], column: str, where: str) -> str:
    text = text_in(row, column, where)
    if not text.strip():
        got = f"an empty '{column}'" if column in row else ", ".join(map(str, row)) or "none"
        raise ValueError(f"{where}: required a column '{column}' with a text, got {got}")
    return text


def _file(row: Mapping[str, Any], column: str, where: str, opened: Callable[[bytes], Any]) -> Any:
    """Return the opened file of a row's column."""
    value = _required(row, column, where)
    try:
        return opened(content_of(value))
    except ValueError as error:
        raise ValueError(f"{where}: column '{column}': {error}") from error


def content_of(value: str | bytes) -> bytes:
    """Return the content of a file, from itself, its base64 text, or a path; raise ValueError if it is none."""
    if isinstance(value, bytes):
        return value
    if len(value) < _LONGEST_PATH and Path(value).is_file():
        return Path(value).read_bytes()
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{value!r:.80} is neither the path of a file that is here nor base64 text") from error


def open_image(value: str | bytes) -> Any:
    """Return an image as RGB from the content of its file, its base64 text, or a path.

    The image is rotated by its EXIF orientation; of several frames or pages the first is used, and of
    transparent pixels the colour.

    Raises:
        ValueError: it is none of these, or has more than 8 bits per channel, which would be lost.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Any = Image.open(BytesIO(content_of(value)))
        if image.mode[0] in "IF":
            raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}); required 8: scale it")
        image = ImageOps.exif_transpose(image)
        if image.mode == "P":  # its transparency may be a list, which gives a warning
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a format that can be read") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image that can be read: {error}") from error


# Prompts of rows, as text and as token ids.


def prompt_of(record: Mapping[str, Any], row: Mapping[str, Any], where: str) -> str:
    """Return the prompt of a row of {prompt} (verbatim) or {instruction, input} (by the template).

    Raises:
        ValueError: the row has neither, or both.
    """
    if _asking(row, ("prompt", "instruction"), where) == "prompt":
        return text_in(row, "prompt", where)
    asked, shown = text_in(row, "instruction", where), text_in(row, "input", where)
    return render(record["template"], asked, shown)


def text_in(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return a text of a row; empty if there is none.

    Raises:
        ValueError: it is a list or another object, whose Python form would become the prompt.
    """
    value = row.get(column)
    if isinstance(value, Iterable) and not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{where}: column '{column}' must be text, got {kind}; give a list of rows, one for each text")
    return "" if value is None else str(value)


def asked_ids(tokenizer: Any, record: Mapping[str, Any], row: Mapping[str, Any], where: str) -> list[int]:
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


def _asking(row: Mapping[str, Any], ways: Sequence[str], where: str) -> str:
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


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
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


def _chat_ids(tokenizer: Any, messages: Rows, tools: list[Any] | None, where: str) -> list[int]:
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
