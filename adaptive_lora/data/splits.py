"""Division into train, validation and test parts that share no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet
from adaptive_lora.errors import DataError
from adaptive_lora.seeding import rng_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The three parts of one fold."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def split_set(data: ExampleSet, config: DataConfig, fold: int = 0) -> Splits:
    """Divide all examples of a study; a test part of its own stays whole.

    Prompts that the test part has are left out of the other parts.

    Raises:
        DataError: too few different prompts to fill every part.
    """
    if data.test is None:
        return split_examples(data.examples, config, fold)
    tested = {_key(example) for example in data.test}
    rest = [example for example in data.examples if _key(example) not in tested]
    groups = _shuffled(rest, config)
    cut = round(config.validation_share * len(groups))
    if not 0 < cut < len(groups):
        raise DataError(
            f"{len(groups)} different prompts that test_data does not have leave the training or "
            f"the validation part empty (validation_share {config.validation_share:g}); give more "
            "examples or another share."
        )
    train, validation = chain.from_iterable(groups[cut:]), chain.from_iterable(groups[:cut])
    return Splits(train=tuple(train), validation=tuple(validation), test=data.test)


def split_examples(examples: Sequence[Example], config: DataConfig, fold: int = 0) -> Splits:
    """Divide examples by prompt, so that repetitions of a prompt never leak between parts.

    Prompts are compared without case and white space. With `folds` of 2 or more, each prompt is in
    the test part of exactly one fold, and validation is drawn from the rest.

    Raises:
        DataError: too few different prompts to fill every part.
    """
    shuffled = _shuffled(examples, config)
    if config.folds > 1:
        test = shuffled[fold :: config.folds]
        rest = [group for index, group in enumerate(shuffled) if index % config.folds != fold]
    else:
        cut = round(config.test_share * len(shuffled))
        test, rest = shuffled[:cut], shuffled[cut:]
    cut = round(config.validation_share * len(shuffled))
    splits = {"validation": rest[:cut], "test": test, "train": rest[cut:]}
    empty = [name for name, part in splits.items() if not part]
    if empty:
        raise DataError(
            f"{len(shuffled)} different prompts leave the {' and '.join(empty)} part empty "
            f"(shares: validation {config.validation_share:g}, test {config.test_share:g}, folds "
            f"{config.folds}); give more examples or other shares."
        )
    return Splits(**{name: tuple(chain.from_iterable(part)) for name, part in splits.items()})


def _shuffled(examples: Sequence[Example], config: DataConfig) -> list[list[Example]]:
    """Return the examples of each different prompt, in the order of the split's seed."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_key(example), []).append(example)
    order, listed = rng_for(config.split_seed, "split").permutation(len(groups)), [*groups.values()]
    return [listed[index] for index in order]


def _key(example: Example) -> str:
    """Return what makes two examples the same: their texts without case and white space."""
    texts = (example.prompt or example.response, *filter(None, [example.second]))
    return "\0".join(" ".join(text.lower().split()) for text in texts)
