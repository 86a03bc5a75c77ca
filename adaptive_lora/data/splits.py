"""Division into train, validation and test parts that share no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example
from adaptive_lora.errors import DataError
from adaptive_lora.seeding import rng_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The three parts of one fold."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def split_examples(examples: Sequence[Example], config: DataConfig, fold: int = 0) -> Parts:
    """Divide examples by prompt, so that repetitions of a prompt never leak between parts.

    Prompts are compared without case and white space. With `folds` of 2 or more, each prompt is in
    the test part of exactly one fold, and validation is drawn from the rest.

    Raises:
        DataError: too few different prompts to fill every part.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(" ".join(example.prompt.lower().split()), []).append(example)
    order = rng_for(config.split_seed, "split").permutation(len(groups))
    shuffled = [list(groups.values())[index] for index in order]
    if config.folds > 1:
        test = shuffled[fold :: config.folds]
        rest = [group for index, group in enumerate(shuffled) if index % config.folds != fold]
    else:
        cut = round(config.test_share * len(shuffled))
        test, rest = shuffled[:cut], shuffled[cut:]
    cut = round(config.validation_share * len(shuffled))
    parts = {"validation": rest[:cut], "test": test, "train": rest[cut:]}
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"{len(groups)} different prompts leave the {' and '.join(empty)} part empty (shares: "
            f"validation {config.validation_share:g}, test {config.test_share:g}, folds "
            f"{config.folds}); give more examples or other shares."
        )
    return Parts(**{name: tuple(chain.from_iterable(part)) for name, part in parts.items()})
