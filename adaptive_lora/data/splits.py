"""Division into train, validation and test splits that share no prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet
from adaptive_lora.data.sequences import Rows
from adaptive_lora.errors import DataError
from adaptive_lora.seeding import rng_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The three splits of one fold, chosen from all examples of their source."""

    train: Rows[Example]
    validation: Rows[Example]
    test: Rows[Example]


def split_set(data: ExampleSet, config: DataConfig, fold: int = 0) -> Splits:
    """Split all examples of a study; a separate test source is used whole as the test split.

    Rows of the other splits whose prompt is also in the test split are removed.

    Raises:
        DataError: there are too few distinct prompts to fill every split.
    """
    keys, own = data.prompt_keys, len(data.examples)
    if data.test is None:
        return _split(data.every, keys, config, fold)
    tested = set(keys[own:])
    groups = _shuffled({index: key for index, key in enumerate(keys[:own]) if key not in tested}, config)
    cut = round(config.validation_share * len(groups))
    if not 0 < cut < len(groups):
        raise DataError(
            f"{len(groups)} different prompts that test_data does not have leave the training or "
            f"the validation split empty (validation_share {config.validation_share:g}); give more "
            "examples or another share."
        )
    return Splits(
        train=_rows(data.every, groups[cut:]),
        validation=_rows(data.every, groups[:cut]),
        test=Rows(data.every, range(own, len(keys))),
    )


def split_examples(examples: Sequence[Example], config: DataConfig, fold: int = 0) -> Splits:
    """Split examples by prompt, so that repetitions of a prompt are never in two splits.

    Prompts are compared without case and white space. With `folds` of 2 or more, each prompt is in
    the test split of exactly one fold, and validation is drawn from the rest.

    Raises:
        DataError: there are too few distinct prompts to fill every split.
    """
    return _split(examples, [example.prompt_key for example in examples], config, fold)


def _split(examples: Sequence[Example], keys: Sequence[bytes], config: DataConfig, fold: int) -> Splits:
    shuffled = _shuffled(dict(enumerate(keys)), config)
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
    return Splits(**{name: _rows(examples, part) for name, part in splits.items()})


def _shuffled(keys: Mapping[int, bytes], config: DataConfig) -> list[list[int]]:
    """Return the indices of the examples of each distinct prompt, shuffled by `split_seed`."""
    groups: dict[bytes, list[int]] = {}
    for index, key in keys.items():
        groups.setdefault(key, []).append(index)
    order, listed = rng_for(config.split_seed, "split").permutation(len(groups)), [*groups.values()]
    return [listed[index] for index in order]


def _rows(examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> Rows[Example]:
    return Rows(examples, tuple(chain.from_iterable(groups)))
