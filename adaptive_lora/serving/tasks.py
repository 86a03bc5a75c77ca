"""The tasks: one specification each, from which loading, training, serving and the docs take what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .answers import (
    Loaded,
    autocast,
    classify_images,
    classify_texts,
    compare_images,
    continue_prompts,
    describe_images,
    estimate_numbers,
    write_targets,
)
from .prompts import LISTS

_PROMPT = ("prompt", "instruction", "input")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a task needs of its base, and how an adapter for it is served."""

    name: str
    """Value of the option `task`."""
    auto_class: str
    """Transformers' class that loads its models."""
    answer: Callable[[Loaded, Sequence[Mapping[str, Any]], int], list[Any]]
    """Answers rows with at most so many new tokens."""
    columns: tuple[str, ...]
    """Columns that it is served with; of `prompt`, `instruction` and `messages` one, `image` as base64 text or the
    path of a file."""
    processor: str = "AutoTokenizer"
    """Transformers' class of what makes its inputs."""
    saved_as: str = ""
    """Transformers' class whose checkpoints are of this task, whatever the data; empty: none is."""
    generates: bool = False
    """Whether it takes `max_new_tokens`."""
    needs_end: bool = False
    """Whether its tokenizer must have an end-of-text token."""
    numbers: bool = False
    """Whether it answers with numbers; others with text."""
    head: bool = False
    """Whether it trains a head beside adapters."""
    head_over_text: bool = False
    """Whether its head is over texts, so that decoders can take it, too."""

    @property
    def model_class(self) -> Any:
        """Class that loads its models."""
        import transformers

        return getattr(transformers, self.auto_class)


TASKS: Mapping[str, TaskSpec] = MappingProxyType(
    {
        task.name: task
        for task in (
            TaskSpec(
                name="causal",
                auto_class="AutoModelForCausalLM",
                saved_as="AutoModelForCausalLM",
                answer=continue_prompts,
                columns=(*_PROMPT, *LISTS),
                generates=True,
                needs_end=True,
            ),
            TaskSpec(
                name="classification",
                auto_class="AutoModelForSequenceClassification",
                answer=classify_texts,
                columns=("text", "second"),
                head=True,
                head_over_text=True,
            ),
            TaskSpec(
                name="regression",
                auto_class="AutoModelForSequenceClassification",
                answer=estimate_numbers,
                columns=("text", "second"),
                numbers=True,
                head=True,
                head_over_text=True,
            ),
            TaskSpec(
                name="seq2seq",
                auto_class="AutoModelForSeq2SeqLM",
                saved_as="AutoModelForSeq2SeqLM",
                answer=write_targets,
                columns=_PROMPT,
                generates=True,
            ),
            TaskSpec(
                name="image_classification",
                auto_class="AutoModelForImageClassification",
                saved_as="AutoModelForImageClassification",
                processor="AutoImageProcessor",
                answer=classify_images,
                columns=("image",),
                head=True,
            ),
            TaskSpec(
                name="image_text",
                auto_class="AutoModel",
                saved_as="AutoModelForZeroShotImageClassification",
                processor="AutoProcessor",
                answer=compare_images,
                columns=("image", "text"),
                numbers=True,
            ),
            TaskSpec(
                name="vision_language",
                auto_class="AutoModelForImageTextToText",
                saved_as="AutoModelForImageTextToText",
                processor="AutoProcessor",
                answer=describe_images,
                columns=("image", "question"),
                generates=True,
                needs_end=True,
            ),
        )
    }
)
"""Name -> task."""


def answer(loaded: Loaded, rows: Iterable[Mapping[str, Any]], max_new_tokens: int) -> list[Any]:
    """Answer rows by the adapter's task; `TaskSpec.columns` names what they hold.

    Raises:
        ValueError: a row has not the columns that the task needs, or cannot be asked.
    """
    listed = list(rows)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    task = TASKS[loaded[2].get("task", {"name": "causal"})["name"]]
    with autocast(loaded):
        return task.answer(loaded, listed, max_new_tokens)
