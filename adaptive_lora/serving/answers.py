"""Answers of a served adapter, one function per task."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

from .images import answer_questions
from .prompts import asked_ids, prompt_of, text_in
from .text import free_positions, generate, generate_targets
from .tokens import known_ids, unknown_ids

Loaded = tuple[Any, Any, Mapping[str, Any]]
"""Adapted model, processor, record."""
Rows = Sequence[Mapping[str, Any]]
_BATCH = 32
_PAIR = ("input_ids", "attention_mask", "pixel_values")


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
        second = [_required(row, "second") for row in part if row.get("second")]
        inputs = tokenizer(
            [_required(row, "text") for row in part],
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
        images = [open_image(_required(row, "image")) for row in rows[start : start + _BATCH]]
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
    for row in rows:
        inputs = processor(
            text=[_required(row, "text")],
            images=[open_image(_required(row, "image"))],
            truncation=True,
            max_length=record["task"]["max_tokens"],
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model(**{name: inputs[name].to(model.device) for name in _PAIR})
        found.append(float((output.image_embeds.float() * output.text_embeds.float()).sum()))
    return found


def describe_images(loaded: Loaded, rows: Rows, max_new_tokens: int) -> list[str]:
    """Return the answer to a question on each image."""
    model, processor, _ = loaded
    asked = [(_required(row, "question"), open_image(_required(row, "image"))) for row in rows]
    return answer_questions(model, processor, asked, max_new_tokens=max_new_tokens)


def _largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index])


def _required(row: Mapping[str, Any], column: str) -> str:
    if not row.get(column):
        raise ValueError(f"required a column '{column}', got {sorted(row)}")
    return text_in(row, column, "a row")


def open_image(value: str | bytes) -> Any:
    """Return an image as RGB from the content of its file, its base64 text, or a path.

    The image is rotated by its EXIF orientation; of several frames or pages the first is used, and of
    transparent pixels the colour.

    Raises:
        ValueError: it is none of these, or has more than 8 bits per channel, which would be lost.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, str):
        is_path = len(value) < 4096 and Path(value).is_file()
        value = Path(value).read_bytes() if is_path else base64.b64decode(value)
    try:
        image: Any = Image.open(BytesIO(value))
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
