"""The tasks: one specification each, from which loading, training, serving and the docs take what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .answers import (
    LISTS,
    Loaded,
    autocast,
    classify_images,
    classify_texts,
    compare_images,
    continue_prompts,
    describe_images,
    estimate_numbers,
    tag_words,
    write_targets,
    write_transcripts,
)

_PROMPT = ("prompt", "instruction", "input")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Specification of a task: loading of its base, and serving of its adapters."""

    name: str
    """Name: value of the option `task`."""
    auto_class: str
    """Name of the transformers class that loads its models."""
    answer: Callable[[Loaded, Sequence[Mapping[str, Any]], int], list[Any]]
    """Function that answers rows with a maximum number of new tokens."""
    columns: tuple[str, ...]
    """Columns in serving; exactly one of `prompt`, `instruction` and `messages`; `image` and `audio` as base64
    text or the path of a file."""
    processor: str = "AutoTokenizer"
    """Name of the transformers class of its tokenizer or processor."""
    saved_as: str = ""
    """Name of the transformers class whose checkpoints are of this task for any data; empty: none."""
    generates: bool = False
    """Mark of a task that generates text, limited by `max_new_tokens`."""
    needs_end: bool = False
    """Mark of a task whose tokenizer must have an end-of-text token."""
    numbers: bool = False
    """Kind of its answers: numbers if true, else text."""
    head: bool = False
    """Mark of a task that trains a head in addition to adapters."""
    head_over_text: bool = False
    """Mark of a head on texts, which decoders support too."""

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
                name="token_classification",
                auto_class="AutoModelForTokenClassification",
                saved_as="AutoModelForTokenClassification",
                answer=tag_words,
                columns=("text",),
                head=True,
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
            TaskSpec(
                name="speech_to_text",
                auto_class="AutoModelForSpeechSeq2Seq",
                saved_as="AutoModelForSpeechSeq2Seq",
                processor="AutoProcessor",
                answer=write_transcripts,
                columns=("audio",),
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
