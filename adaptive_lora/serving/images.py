"""Inputs of models that see: questions about images and their answers, and images with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .greedy import batches_of, filled, greedy_batches, mask_of, pads_left
from .tokens import encode

_SEEN = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""Inputs of an image for models that compare images and captions."""
_GRID, _SIZES = "image_grid_thw", "image_sizes"
"""Inputs that give the number of an image's patches (Qwen-VL), or its height and width (Pixtral)."""
Asked = tuple[str, Any]
"""A question and its image."""


def inputs_of(processor: Any, asked: Asked) -> dict[str, Any]:
    """Return the model's inputs for one question, with a token for each patch of the image.

    Tokens that the tokenizer adds after every text are left out, because the answer follows.
    """
    question, image = asked
    prompt = prompt_of(processor, question)
    found = processor(text=[prompt], images=[image], return_tensors="pt")
    (encoded,) = encode(processor.tokenizer, [prompt])
    length = found["input_ids"].shape[1]
    kept = length - len(encoded.ids) + encoded.stop
    return {
        name: tensor[:, :kept] if tuple(tensor.shape) == (1, length) else tensor
        for name, tensor in found.items()
        if hasattr(tensor, "shape")
    }


def prompt_of(processor: Any, question: str) -> str:
    """Return the text before an answer, by the processor's chat template if it has one."""
    if not getattr(processor, "chat_template", None):
        return f"{processor.image_token}\n{question}\n"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def answer_ids(processor: Any, question: str, answer: str) -> list[int]:
    """Return an answer's token ids as a continuation of its question."""
    prompt = prompt_of(processor, question)
    (encoded,) = encode(processor.tokenizer, [prompt + answer])
    return encoded.ids[encoded.first_token(len(prompt)) : encoded.stop]


def answer_type(settings: Any) -> int:
    """Return the token type of an answer: PaliGemma's 0 marks the prefix, whose tokens see those after them."""
    return int(settings.model_type == "paligemma")


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Divide one question's inputs into those with one integer per token and those of the image.

    The first dimension of an image's inputs is 1, also of patches in rows (Qwen2-VL).

    Raises:
        ValueError: the image is not one row, so that rows of a batch could not be assigned to examples.
    """
    length = inputs["input_ids"].shape[1]
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}  # PaliGemma's, of the question
    by_token = {n: t[0].tolist() for n, t in inputs.items() if tuple(t.shape) == (1, length)}
    shown = {name: tensor for name, tensor in inputs.items() if name not in by_token}
    if _GRID in shown:
        shown["pixel_values"] = shown["pixel_values"][None]
    odd = [name for name, tensor in shown.items() if tensor.shape[0] != 1]
    if odd:
        raise ValueError(
            f"one image becomes {shown[odd[0]].shape[0]} rows of {odd[0]}; required one row per image "
            "(let the processor resize it, without splitting into tiles)"
        )
    by_token.pop("attention_mask", None)
    return by_token, shown


def joined_images(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the images of several questions as one batch.

    Where another input gives the size of each image, smaller ones are padded with zeros at the end.

    Raises:
        ValueError: the images differ in shape.
    """
    import torch
    from torch.nn import functional

    shapes = {name: {tuple(part[name].shape) for part in parts} for name in parts[0]}
    sized = {"pixel_values"} if _GRID in shapes or _SIZES in shapes else set()
    odd = [name for name, found in shapes.items() if len(found) > 1 and name not in sized]
    if odd:
        raise ValueError(
            f"images differ in their {odd[0]}: {sorted(shapes[odd[0]])}; required one shape (let "
            "the processor resize them, without splitting into tiles)"
        )

    def whole(tensor: Any, name: str) -> Any:
        most = map(max, zip(*shapes[name], strict=True))
        missing = [most - size for most, size in zip(most, tensor.shape, strict=True)]
        return functional.pad(tensor, [each for size in reversed(missing) for each in (0, size)])

    return {name: torch.cat([whole(part[name], name) for part in parts]) for name in parts[0]}


def as_patches(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch's inputs as the model takes them: the patches of all images in rows, without their padding."""
    import torch

    if _GRID not in inputs:
        return dict(inputs)
    counts = inputs[_GRID].prod(dim=1).tolist()
    rows = [pixels[:count] for pixels, count in zip(inputs["pixel_values"], counts, strict=True)]
    return {**inputs, "pixel_values": torch.cat(rows)}


def pair_inputs(settings: Any, processor: Any, captions: Sequence[Sequence[int]], images: Sequence[Any]) -> Any:
    """Return the inputs for images and captions.

    SigLIP's text tower reads its last position, so that texts are padded to its length, and without a
    mask where its tokenizer gives none.

    Args:
        settings: configuration of the model.
        processor: processor of the model.
        captions: token ids of each caption.
        images: the images.
    """
    tokenizer = processor.tokenizer
    last = settings.model_type in ("siglip", "siglip2")
    room = settings.text_config.max_position_embeddings if last else max(map(len, captions))
    pad = [int(tokenizer.pad_token_id)]
    texts = {"input_ids": filled([[*ids, *pad * (room - len(ids))] for ids in captions], 0)}
    if "attention_mask" in tokenizer.model_input_names or not last:
        texts["attention_mask"] = filled([[1] * len(ids) + [0] * (room - len(ids)) for ids in captions], 0)
    shown = processor.image_processor(images=list(images), return_tensors="pt")
    return {**texts, **{name: shown[name] for name in _SEEN if name in shown}}


def answer_questions(
    model: Any, processor: Any, asked: Sequence[Asked], *, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """Answer greedily, shortest first in batches, and return texts in the given order."""
    split = [split_inputs(inputs_of(processor, each)) for each in asked]
    model.eval()
    if len(split) > 1 and not pads_left(model):
        batch_size = 1

    def inputs(chosen: Sequence[int]) -> dict[str, Any]:
        tokens, shown = zip(*(split[index] for index in chosen), strict=True)
        texts = {name: filled([row[name] for row in tokens], 0, left=True) for name in tokens[0]}
        mask = mask_of([row["input_ids"] for row in tokens], left=True)
        return as_patches({**texts, "attention_mask": mask, **joined_images(shown)})

    batches = batches_of([tokens["input_ids"] for tokens, _ in split], batch_size)
    pad = int(processor.tokenizer.eos_token_id)
    return greedy_batches(model, processor, batches, inputs, max_new_tokens=max_new_tokens, pad=pad)
