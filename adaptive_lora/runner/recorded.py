"""Settings, base scores, looks and data lines that a study recorded for all of its trials, read from the store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.analysis.comparison import SeedPlan
from adaptive_lora.config import current_settings
from adaptive_lora.errors import ConfigError, TrackingError, brief
from adaptive_lora.results import EvalResult
from adaptive_lora.tracking import StudyRun, eval_from_dict
from adaptive_lora.tracking.runs import CORRUPTION

T = TypeVar("T")

CONFIG = "study.json"
BASE_SCORES = "frozen.json"
EXAMPLES = "examples.json"
DATA = "data.json"
LOOKS = "looks.json"
LOOKS_TAG = "looks"
"""Tag with the number of looks of a study that goes on until it is decided."""


def study_settings(study: StudyRun) -> dict[str, Any]:
    """Return the recorded settings of a study.

    Raises:
        TrackingError: the settings are missing or corrupt.
    """
    settings = recorded_json(study, CONFIG, _grid_settings, required=True)
    assert settings is not None
    return current_settings({**settings, "methods": [_with_least(text, None) for text in settings["methods"]]})[0]


def settings_to_record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as `study_settings` reads them back."""
    return {**settings, "methods": [_with_least(text, "default") for text in settings["methods"]]}


def _with_least(text: str, least: str | None) -> str:
    """Return a method's text with its `min_rank`, where the method has a default of its own for that.

    A study records that default. A text recorded without it is of a version in which no method had one.
    """
    try:
        name, options = MethodSpec.split(text)
        kind = METHODS.get(str(options.get("of", name)))
    except ConfigError:  # of a package that is not installed here
        return text
    if kind is None or kind.least_rank is None or "min_rank" in options:
        return text
    return MethodSpec.with_option(text, "min_rank", kind.least_rank if least else "none")


def recorded_base_scores(study: StudyRun) -> dict[int, EvalResult] | None:
    """Return the recorded scores of a study's base per fold; None where none were recorded.

    Raises:
        TrackingError: they are corrupt.
    """
    return recorded_json(study, BASE_SCORES, _scores_by_fold)


def recorded_plan(study: StudyRun) -> SeedPlan | None:
    """Return the recorded looks of a study that goes on until it is decided; None of another study.

    Raises:
        TrackingError: they are corrupt.
    """
    if LOOKS_TAG not in study.recorded().data.tags:  # servers take long to say that an artifact is missing
        return None
    return recorded_json(study, LOOKS, SeedPlan.from_dict)


def recorded_json(study: StudyRun, name: str, read: Callable[[Any], T], *, required: bool = False) -> T | None:
    """Return what a study recorded in a JSON artifact; None where an earlier version recorded nothing.

    Raises:
        TrackingError: the artifact is corrupt, or missing though required.
    """
    try:
        return read(study.store.read_json(study.run_id, name))
    except (OSError, *CORRUPTION) as error:
        if isinstance(error, OSError) and not required:
            return None
        raise TrackingError(
            f"study {study.study_id} has no readable {name} ({brief(error)}); the study command with "
            "the settings of then writes it again."
        ) from error


def _grid_settings(settings: Any) -> dict[str, Any]:
    """Return recorded settings; raises TypeError or KeyError if they lack methods, rates or seeds."""
    if not isinstance(settings, dict):
        raise TypeError(f"required a JSON object, got {type(settings).__name__}")
    for name, kind in (("methods", str), ("lr", int | float), ("seeds", int)):
        values = settings[name]
        if not isinstance(values, list) or not values:
            raise TypeError(f"required a list of {name}, got {values!s:.80}")
        if not all(isinstance(value, kind) and value is not True for value in values):
            raise TypeError(f"required {name} of type {kind}, got {values!s:.80}")
    return settings


def _scores_by_fold(values: Any) -> dict[int, EvalResult]:
    found = {int(fold): eval_from_dict(result) for fold, result in values.items()}
    if not all(math.isfinite(loss) for one in found.values() for loss in one.nll_E):
        raise ValueError("a loss is not finite")
    return found


def texts_of(values: Any) -> dict[str, str]:
    """Return recorded texts by example id; raises TypeError if they are not."""
    if not all(isinstance(text, str) for text in values.values()):
        raise TypeError("required texts by example id")
    return dict(values)


def lines_of(values: Any) -> tuple[str, ...]:
    """Return the recorded lines of a data summary; raises KeyError or TypeError if there are none."""
    lines = values["block"]
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise TypeError("required a list of lines")
    return tuple(lines)
