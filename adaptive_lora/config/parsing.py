"""Study files and command-line options: read strictly, with all problems at once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config.renamed import RENAMED_SETTINGS, current_settings
from adaptive_lora.config.study import StudyConfig, option_fields
from adaptive_lora.config.text_files import Unreadable, parse_yaml, read_text
from adaptive_lora.errors import ConfigError, unknown_name
from adaptive_lora.options import as_choice, out_of_limits, parse_value

_PLACES = ("model", "data", "test_data", "template", "output")
"""Settings that may be a path, in which `~` is expanded; shells expand it only at a word's start."""


def study_from(
    values: Mapping[str, object], where: Mapping[str, str] | None = None, base: StudyConfig | None = None
) -> StudyConfig:
    """Make a study from option values on top of another study's, reporting all problems at once.

    Args:
        values: option name -> text or parsed value.
        where: option name -> source of the value ("study.yaml line 3"), for messages.
        base: settings that `values` override; None: the defaults.

    Raises:
        ConfigError: every unknown name and wrong value, one per line.
    """
    fields, problems = option_fields(), _given_twice(values)
    sections: dict[str | None, dict[str, Any]] = {}
    current, renamed = current_settings(values)
    for sentence in renamed:
        logging.getLogger(__name__).warning("%s.", sentence)
    for name, value in current.items():
        place = f"{_place_of(name, where or {})}: "
        if name not in fields:
            problems.append(place + unknown_name("setting", name, fields))
            continue
        section, field, annotation = fields[name]
        try:
            parsed = parse_value(annotation, as_choice(value, field.metadata["limits"]))
        except (ValueError, TypeError) as error:
            problems.append(f"{place}{name}: {error}")
            continue
        problem = out_of_limits(name, parsed, field.metadata["limits"])
        if problem:
            problems.append(place + problem)
            continue
        if name in _PLACES and isinstance(parsed, str) and parsed.startswith("~"):
            parsed = str(Path(parsed).expanduser())
        sections.setdefault(section, {})[name] = parsed
    base = base or StudyConfig()
    top = sections.pop(None, {})
    changed = {str(name): dataclasses.replace(getattr(base, str(name)), **inner) for name, inner in sections.items()}
    study = dataclasses.replace(base, **changed, **top)
    problems += _grid_problems(study)
    if problems:
        raise ConfigError("\n".join(problems))
    return study


def _place_of(name: str, where: Mapping[str, str]) -> str:
    """Return the source of a setting, given under its present or its earlier name."""
    earlier = next((old for old, now in RENAMED_SETTINGS.items() if now == name), name)
    return where.get(name) or where.get(earlier) or f"option {name}"


def _given_twice(values: Mapping[str, object]) -> list[str]:
    return [
        f"{earlier} is the earlier name of {now}; required one of them, got both"
        for earlier, now in RENAMED_SETTINGS.items()
        if values.get(earlier) is not None and values.get(now) is not None
    ]


def _grid_problems(study: StudyConfig) -> list[str]:
    problems: list[str] = []
    labels: list[str] = []
    for text in study.methods:
        try:
            labels.append(MethodSpec.parse(text).label)
        except ConfigError as error:
            problems.append(str(error))
    for name, items in (("methods", labels), ("seeds", study.seeds), ("lr", study.lr)):
        repeated = sorted({str(item) for item in items if list(items).count(item) > 1})
        if repeated:
            problems.append(f"{name}: given more than once: {', '.join(repeated)}")
        if not items and not problems:
            problems.append(f"{name}: required at least one, got none")
    if study.baseline is not None and not problems and study.baseline not in labels:
        problems.append(unknown_name("baseline", study.baseline, labels))
    problems += _race_problems(study)
    if study.data.validation_share + study.data.test_share >= 1:
        problems.append("validation_share and test_share leave nothing to train on")
    if study.data.folds > 1 and (study.data.test_data or study.data.test_split):
        problems.append("test_data and test_split give the only test split; required folds 1")
    return problems


def _race_problems(study: StudyConfig) -> list[str]:
    if not study.race:
        return []
    problems = []
    if len(study.lr) < 2:
        problems.append(f"race: required at least two learning rates (lr), got {len(study.lr)}")
    if study.engine == "together":
        problems.append("race: trials together cannot be stopped one by one; use --engine serial")
    if study.train.validations < 3:
        problems.append(
            "race: rates are compared by a validation pass at one and two thirds of the training; "
            f"required validations of at least 3, got {study.train.validations}"
        )
    return problems


def load_study(path: Path, overrides: Mapping[str, object]) -> StudyConfig:
    """Read a study file; command-line options override its settings.

    Raises:
        ConfigError: no such file, not plain YAML (with line), or any wrong setting.
    """
    try:
        values, lines = parse_yaml(read_text(path))
    except Unreadable as error:
        raise ConfigError(f"study file {path} cannot be read: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"study file {path}: required `setting: value` lines, got {values!r:.60}")
    where = {name: f"{path} line {line}" for name, line in lines.items()}
    ours = {str(key): value for key, value in values.items()}
    for names in RENAMED_SETTINGS.items():
        if any(name in overrides for name in names):  # a new name overrides an earlier one too
            for name in names:
                ours.pop(name, None)
    merged = {**ours, **overrides}
    return study_from(merged, {**where, **{key: "option" for key in overrides}})
