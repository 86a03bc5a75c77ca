"""Division into train, validation and test splits that share no prompt."""

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
    """The three splits of one fold."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def split_set(data: ExampleSet, config: DataConfig, fold: int = 0) -> Splits:
    """Split all examples of a study; a separate test source is used whole as the test split.

    Rows of the other splits whose prompt is also in the test split are removed.

    Raises:
        DataError: there are too few distinct prompts to fill every split.
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
            f"the validation split empty (validation_share {config.validation_share:g}); give more "
            "examples or another share."
        )
    train, validation = chain.from_iterable(groups[cut:]), chain.from_iterable(groups[:cut])
    return Splits(train=tuple(train), validation=tuple(validation), test=data.test)


def split_examples(examples: Sequence[Example], config: DataConfig, fold: int = 0) -> Splits:
    """Split examples by prompt, so that repetitions of a prompt are never in two splits.

    Prompts are compared without case and white space. With `folds` of 2 or more, each prompt is in
    the test split of exactly one fold, and validation is drawn from the rest.

    Raises:
        DataError: there are too few distinct prompts to fill every split.
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
            f"{len(shuffled)} different prompts leave the {' and '.join(empty)} split empty "
            f"(shares: validation {config.validation_share:g}, test {config.test_share:g}, folds "
            f"{config.folds}); give more examples or other shares."
        )
    return Splits(**{name: tuple(chain.from_iterable(part)) for name, part in splits.items()})


def _shuffled(examples: Sequence[Example], config: DataConfig) -> list[list[Example]]:
    """Return the examples of each distinct prompt, shuffled by `split_seed`."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_key(example), []).append(example)
    order, listed = rng_for(config.split_seed, "split").permutation(len(groups)), [*groups.values()]
    return [listed[index] for index in order]


def _key(example: Example) -> str:
    """Return the key by which prompts are equal: their texts without case and white space."""
    texts = (example.prompt or example.response, *filter(None, [example.second]))
    return "\0".join(" ".join(text.lower().split()) for text in texts)
