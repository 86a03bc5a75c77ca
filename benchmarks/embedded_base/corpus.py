"""The pretraining corpus: declarative text and instruction tasks, written without end.

The study's tasks are not in it: none of its instructions, none of its invented words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random

from benchmarks.embedded_base.declarative import TEXTS
from benchmarks.embedded_base.practice_languages import LANGUAGE_FAMILIES
from benchmarks.embedded_base.text_tasks import TEXT_FAMILIES
from benchmarks.embedded_base.word_tasks import WORD_FAMILIES

FAMILIES = WORD_FAMILIES + TEXT_FAMILIES + LANGUAGE_FAMILIES
"""All instruction families of pretraining."""
WEIGHTS = tuple(
    3 if family in LANGUAGE_FAMILIES or family.name in ("kind", "spanish_word") else 1 for family in FAMILIES
)
"""How often each family comes; what must be known by heart comes more often."""
INSTRUCTION_SHARE = 0.8
"""Share of documents that are instruction tasks; they are the shorter ones."""
WITH_INPUT = "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
WITHOUT_INPUT = "### Instruction:\n{prompt}\n\n### Response:\n"
"""The prompt texts of pretraining: those of the study's template `compact`."""
END = "<|endoftext|>"
"""Ends every document."""


def render_prompt(example: Mapping[str, str]) -> str:
    """Return the prompt text of an example; the response follows directly."""
    template = WITH_INPUT if example["input"] else WITHOUT_INPUT
    return template.format(prompt=example["instruction"], input=example["input"])


def instruction_document(rng: Random) -> str:
    """Write one instruction task with its answer, as the study's prompts are written."""
    example = rng.choices(FAMILIES, WEIGHTS)[0].example(rng)
    return render_prompt(example) + example["output"]


def text_document(rng: Random) -> str:
    """Write one declarative text."""
    writers, weights = zip(*TEXTS, strict=True)
    return str(rng.choices(writers, weights)[0](rng))


def documents(seed: int | str) -> Iterator[str]:
    """Yield pretraining documents without end; the same seed yields the same ones."""
    rng = Random(f"corpus {seed}")
    while True:
        yield (instruction_document(rng) if rng.random() < INSTRUCTION_SHARE else text_document(rng))


def recipe_summary() -> dict[str, object]:
    """Return what the corpus is made of, for the record beside the weights."""
    return {
        "instruction_share": INSTRUCTION_SHARE,
        "instruction_weights": {f.name: w for f, w in zip(FAMILIES, WEIGHTS, strict=True)},
        "wordings": sum(len(family.wordings) for family in FAMILIES),
        "text_weights": {writer.__name__: weight for writer, weight in TEXTS},
    }
