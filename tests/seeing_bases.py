"""Small bases of models that see, one for each row of the tables, with the processor of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, away_from_zero
from task_bases import byte_tokenizer
from transformers import BatchFeature, ProcessorMixin

from adaptive_lora.models.classes import auto_class

FIRST = 258
"""Id of the first token that a row adds to the byte tokenizer: the one of the image."""
SIZE = {"height": 32, "width": 32}
EDGE = {"longest_edge": 32}
CLIP = ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": SIZE})
SQUARE = ("SiglipImageProcessorPil", {"size": SIZE})
VIT = ("ViTImageProcessorPil", {"size": SIZE})


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """Needs of a row of the tables besides its configuration."""

    images: tuple[str, dict[str, Any]]
    """Class of the image processor, and its settings."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Further settings of the configuration."""
    tokens: tuple[str, ...] = ()
    """Tokens that are added, from `FIRST` on."""
    named: dict[str, str] = field(default_factory=dict)
    """Attribute of the tokenizer -> one of these tokens."""
    own: tuple[str, dict[str, Any]] | None = None
    """Class of the processor, and its settings; None: the image processor alone."""
    patches: Callable[[Any], int] = lambda shown: 1
    """Function from an image's inputs to its number of tokens."""


def _grid(merge: int) -> Callable[[Any], int]:
    return lambda shown: int(shown["image_grid_thw"][0].prod()) // merge**2


QWEN_IDS = {
    "image_token_id": FIRST, "video_token_id": FIRST + 1, "vision_start_token_id": FIRST + 2,
    "vision_end_token_id": FIRST + 3,
}  # fmt: skip
OURS: tuple[str, dict[str, Any]] = ("Questions", {})
QWEN = {
    "own": OURS,
    "changes": QWEN_IDS,
    "tokens": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "patches": _grid(2),
}
OLDER = {"images": ("Qwen2VLImageProcessorPil", {"min_pixels": 28**2, "max_pixels": 56**2, "patch_size": 14}), **QWEN}
NEWER = {"images": ("Qwen2VLImageProcessorPil", {"min_pixels": 32**2, "max_pixels": 64**2, "patch_size": 16}), **QWEN}
ONE: dict[str, Any] = {"changes": {"image_token_id": FIRST}, "tokens": ("<image>",)}
BASES: dict[str, Seeing] = {
    "dinov2-registers": Seeing(images=VIT),
    "deit": Seeing(images=VIT),
    "beit": Seeing(images=VIT),
    "swin": Seeing(images=VIT),
    "siglip": Seeing(images=SQUARE, own=("SiglipProcessor", {})),
    "siglip2": Seeing(
        images=("Siglip2ImageProcessorPil", {"patch_size": 16, "max_num_patches": 4}), own=OURS
    ),
    "metaclip2": Seeing(images=CLIP, own=("CLIPProcessor", {})),
    "qwen2-vl": Seeing(**OLDER),
    "qwen2.5-vl": Seeing(**OLDER),
    "qwen3-vl": Seeing(**NEWER),
    "qwen3.5-vl": Seeing(**NEWER),
    "gemma3-vl": Seeing(
        images=("Gemma3ImageProcessorPil", {"size": SIZE}),
        changes={"boi_token_index": FIRST, "eoi_token_index": FIRST + 1, "image_token_index": FIRST + 2},
        tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        named={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"
        },
        own=("Gemma3Processor", {"image_seq_length": 4}),
    ),
    "mistral3": Seeing(
        images=("PixtralImageProcessorPil", {"size": {"longest_edge": 64}, "patch_size": 32}),
        changes={"image_token_index": FIRST},
        tokens=("[IMG]",),
        own=OURS,
        patches=lambda shown: int(shown["image_sizes"][0].prod()) // 32**2,
    ),
    "paligemma": Seeing(images=SQUARE, own=("PaliGemmaProcessor", {}), named={"bos_token": "a"}, **ONE),
    "llava-next": Seeing(
        images=(
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": 32}, "crop_size": SIZE, "image_grid_pinpoints": [[32, 32]]},
        ),
        changes={"image_token_index": FIRST},
        tokens=("<image>",),
        own=(
            "LlavaNextProcessor",
            {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
    ),
    "internvl": Seeing(images=("GotOcr2ImageProcessorPil", {"size": SIZE, "crop_to_patches": False}), own=OURS, **ONE),
    "smolvlm": Seeing(
        images=(
            "SmolVLMImageProcessorPil", {"size": EDGE, "max_image_size": EDGE, "do_image_splitting": False}
        ),
        changes={"image_token_id": FIRST, "scale_factor": 2},
        tokens=("<image>",),
        own=OURS,
    ),
    "lfm2-vl": Seeing(images=("Siglip2ImageProcessorPil", {"patch_size": 16, "max_num_patches": 4}), own=OURS, **ONE),
}  # fmt: skip


class Questions(ProcessorMixin):
    """Processor of images and questions with the model's own image processor.

    That of the model's own name needs torchvision.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, seeing: Seeing | None = None) -> None:
        super().__init__(image_processor, tokenizer)
        self._seeing = seeing
        self.image_token = tokenizer.convert_ids_to_tokens(FIRST) if len(tokenizer) > FIRST else None

    def __call__(self, text: list[str], images: list[Any], return_tensors: str) -> Any:
        assert self._seeing is not None
        shown = self.image_processor(images=images, return_tensors=return_tensors)
        number = self._seeing.patches(shown)
        found = self.tokenizer([text[0].replace(self.image_token, self.image_token * number)], return_tensors="pt")
        kinds = {"mm_token_type_ids": (found["input_ids"] == FIRST).long()} if "image_grid_thw" in shown else {}
        kept = {name: tensor for name, tensor in shown.items() if name != "num_patches"}
        return BatchFeature({**found, **kinds, **kept})


def write_base(name: str, folder: Path) -> Any:
    """Write a base of a row with random weights; return its processor if only this file can make it."""
    kind, settings, _ = ARCHITECTURES[name]
    seeing = BASES[name]
    tokenizer = byte_tokenizer()
    if seeing.tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(seeing.tokens)})
    if seeing.named:
        tokenizer._set_model_specific_special_tokens(seeing.named)
    images = getattr(transformers, seeing.images[0])(**seeing.images[1])
    processor: Any = images
    if seeing.own == OURS:
        processor = Questions(images, tokenizer, seeing)
    elif seeing.own:
        images.image_seq_length = 4
        processor = getattr(transformers, seeing.own[0])(images, tokenizer, **seeing.own[1])
    text = {"vocab_size": len(tokenizer), "pad_token_id": 257, "eos_token_id": 256, "bos_token_id": None}
    changed = {**settings, **seeing.changes}
    if "text_config" in changed:
        changed["text_config"] = {**changed["text_config"], **text}
    config = getattr(transformers, kind)(**changed)
    saved = auto_class(config)
    config.architectures = [kind.replace("Config", "Model")]  # DeiT has several
    with torch.random.fork_rng():
        torch.manual_seed(0)
        away_from_zero(saved.from_config(config)).save_pretrained(folder)
    for part in (images, tokenizer) if isinstance(processor, Questions) else (processor,):
        part.save_pretrained(folder)
    return processor if isinstance(processor, Questions) else None
