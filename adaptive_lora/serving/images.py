"""Inputs of vision-language models for questions about images, and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .greedy import batches_of, filled, greedy_batches, mask_of, pads_left
from .tokens import encode

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


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Divide one question's inputs into those with one integer per token and those of the image.

    Raises:
        ValueError: the image is not one row, so that rows of a batch could not be assigned to examples.
    """
    length = inputs["input_ids"].shape[1]
    by_token = {n: t[0].tolist() for n, t in inputs.items() if tuple(t.shape) == (1, length)}
    shown = {name: tensor for name, tensor in inputs.items() if name not in by_token}
    odd = [name for name, tensor in shown.items() if tensor.shape[0] != 1]
    if odd:
        raise ValueError(
            f"one image becomes {shown[odd[0]].shape[0]} rows of {odd[0]}; required one row per image, "
            "as in LLaVA, SmolVLM and Idefics3 (not in Qwen2-VL)"
        )
    by_token.pop("attention_mask", None)
    return by_token, shown


def joined_images(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the images of several questions as one batch.

    Raises:
        ValueError: the images differ in shape.
    """
    import torch

    shapes = {name: {tuple(part[name].shape) for part in parts} for name in parts[0]}
    odd = [name for name, found in shapes.items() if len(found) > 1]
    if odd:
        raise ValueError(
            f"images differ in their {odd[0]}: {sorted(shapes[odd[0]])}; required one shape (let "
            "the processor resize them, without splitting into tiles)"
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
        return {**texts, "attention_mask": mask, **joined_images(shown)}

    batches = batches_of([tokens["input_ids"] for tokens, _ in split], batch_size)
    pad = int(processor.tokenizer.eos_token_id)
    return greedy_batches(model, processor, batches, inputs, max_new_tokens=max_new_tokens, pad=pad)
