"""An instruction family: one task, many wordings of its instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

WITH_INPUT = "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
WITHOUT_INPUT = "### Instruction:\n{prompt}\n\n### Response:\n"
"""The prompt texts of pretraining: those of the study's template `compact`."""


@dataclass(frozen=True, slots=True)
class Family:
    """One task of the pretraining corpus."""

    name: str
    wordings: tuple[str, ...]
    """Instructions; `{x}` takes the input inline, without it the input stands apart."""
    make: Callable[[Random], tuple[str, str]]
    """Chooses (input, output)."""

    def example(self, rng: Random) -> dict[str, str]:
        """Return one example: instruction, input, output and family."""
        given, output = self.make(rng)
        wording = rng.choice(self.wordings)
        inline = "{x}" in wording
        return {
            "instruction": wording.replace("{x}", given),
            "input": "" if inline else given,
            "output": output,
            "family": self.name,
        }


def render_prompt(example: dict[str, str]) -> str:
    """Return the prompt text of an example; the response follows directly."""
    template = WITH_INPUT if example["input"] else WITHOUT_INPUT
    return template.format(prompt=example["instruction"], input=example["input"])
