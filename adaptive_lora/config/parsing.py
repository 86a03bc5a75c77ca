"""Study files and command-line options: read strictly, with all problems at once.

Settings of earlier versions are read under their names of that time, with a warning that gives the present name.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.allocation.scaling import CONSTANT_AT, DEFAULT_ALPHA, RENAMED
from adaptive_lora.config.planted import NAME as PLANTED
from adaptive_lora.config.retained import RetainedSource
from adaptive_lora.config.sections import WorkersConfig
from adaptive_lora.config.study import StudyConfig, ladder_rungs, option_fields
from adaptive_lora.config.text_files import Unreadable, parse_yaml, read_text
from adaptive_lora.errors import ConfigError, unknown_name
from adaptive_lora.options import parse_options

_PLACES = ("model", "data", "test_data", "template", "output")
"""Settings that may be a path, in which `~` is expanded; shells expand it only at a word's start."""
RENAMED_SETTINGS = {"scale": "alpha", "scale_policy": "scaling", "claim_minutes": "lease_minutes"}
"""Setting of an earlier version -> the setting that replaces it."""
EARLIER_NAMES = tuple(RENAMED_SETTINGS)
EARLIER_DEFAULTS = {"scale": 2.0, "scale_policy": "constant_alpha_over_r"}
"""Setting of version 0.1 -> its default."""

_METHOD_SCALING = re.compile(rf"(?<=[:,])(scaling=)({'|'.join(RENAMED)})(?=[\s,]|$)")


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
    if not isinstance(values, Mapping):
        raise ConfigError(f"required settings by name, a dictionary; got {type(values).__name__}.")
    base = base or StudyConfig()
    section_of = {name: section for name, (section, _, _) in option_fields().items()}
    owners = {name: type(getattr(base, section) if section else base) for name, section in section_of.items()}
    current, renamed = current_settings(values)
    for sentence in renamed:
        logging.getLogger(__name__).warning("%s.", sentence)
    parsed, wrong = parse_options(current, owners, what="setting")
    problems = _given_twice(values)
    problems += [f"{_place_of(name, where or {})}: {problem}" for name, problem in wrong.items()]
    sections: dict[str | None, dict[str, Any]] = {}
    for name, value in parsed.items():
        if name in _PLACES and isinstance(value, str) and value.startswith("~"):
            value = str(Path(value).expanduser())
        if name not in wrong:
            sections.setdefault(section_of[name], {})[name] = value
    top = sections.pop(None, {})
    changed = {str(name): dataclasses.replace(getattr(base, str(name)), **inner) for name, inner in sections.items()}
    study = dataclasses.replace(base, **changed, **top)
    study = dataclasses.replace(study, methods=tuple(map(_with_ranks, study.methods)))
    problems += _grid_problems(study)
    if problems:
        raise ConfigError("\n".join(problems))
    return study


def _with_ranks(text: str) -> str:
    """Return a method's text with the ranks of a file written out, so that it is read alike anywhere, at any time."""
    try:
        options = MethodSpec.parse(text).options
    except ConfigError:  # told with the other problems
        return text
    ranks = getattr(options.wrapped or options, "ranks", None)
    return re.sub(r"(?<=[:,])ranks=[^,]*", f"ranks={'+'.join(ranks)}", text) if isinstance(ranks, tuple) else text


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
    grids: list[Sequence[float]] = []
    for text in study.methods:
        try:
            spec = MethodSpec.parse(text)
            labels.append(spec.label)
            grids.append(spec.lr or study.lr)
            if len(set(spec.lr)) < len(spec.lr):
                problems.append(f"{spec.label}: lr: a rate is given more than once")
        except ConfigError as error:
            problems.append(str(error))
    if study.ladder and not problems:
        try:
            ladder_rungs(study.methods, study.ladder, study.baseline)
        except ConfigError as error:
            problems.append(str(error))
    for name, items in (("methods", labels), ("seeds", study.seeds), ("lr", study.lr), ("ladder", study.ladder)):
        repeated = sorted({str(item) for item in items if list(items).count(item) > 1})
        if repeated:
            problems.append(f"{name}: given more than once: {', '.join(repeated)}")
        if not items and not problems and name != "ladder":
            problems.append(f"{name}: required at least one, got none")
    if study.baseline is not None and not problems and study.baseline not in labels:
        problems.append(unknown_name("baseline", study.baseline, labels))
    problems += _race_problems(study, grids)
    problems += _until_problems(study)
    problems += _worker_problems(study)
    problems += _retain_problems(study)
    if study.data.validation_share + study.data.test_share >= 1:
        problems.append("validation_share and test_share leave nothing to train on")
    if study.data.folds > 1 and (study.data.test_data or study.data.test_split):
        problems.append("test_data and test_split give the only test split; required folds 1")
    return problems


def _race_problems(study: StudyConfig, grids: Sequence[Sequence[float]]) -> list[str]:
    if not study.race:
        return []
    problems = []
    if grids and (most := max(map(len, grids))) < 2:
        problems.append(f"race: required at least two learning rates (lr) of a method, got {most}")
    if study.engine == "together":
        problems.append("race: trials together cannot be stopped one by one; use --engine serial")
    if study.train.validations < 3:
        problems.append(
            "race: rates are compared by a validation pass at one and two thirds of the training; "
            f"required validations of at least 3, got {study.train.validations}"
        )
    return problems


def _until_problems(study: StudyConfig) -> list[str]:
    if study.until == "seeds":
        return [
            f"{name}: only a study until it is decided adds seeds; add --until decided, or leave it out"
            for name in ("max_seeds", "look_seeds")
            if getattr(study, name) != getattr(StudyConfig, name)
        ]
    problems = []
    if study.correction != "holm":
        problems.append(
            f"until: p over several looks is corrected by holm; required that correction, got {study.correction}"
        )
    if len(study.seeds) >= study.max_seeds:
        problems.append(
            f"max_seeds: required more than the {len(study.seeds)} seeds of the first look, got {study.max_seeds}"
        )
    if max(study.seeds, default=0) + study.max_seeds >= 2**32:
        further = study.max_seeds - len(study.seeds)
        problems.append(f"seeds: required numbers below 2^32 that leave room for {further} more after the highest")
    if len(study.methods) < 2:
        problems.append("until: required at least two methods, since a comparison is what is decided")
    return problems


def _worker_problems(study: StudyConfig) -> list[str]:
    worker, problems = study.worker, []
    if study.engine != "ray":
        problems += [
            f"{name}: only Ray has it; add --engine ray, or leave it out"
            for name in ("ray_address", "gpus_per_trial", "cpus_per_trial")
            if getattr(worker, name) != getattr(WorkersConfig, name)
        ]
    if worker.devices != "one":
        other = {"engine ray": study.engine == "ray", "workers": worker.workers is not None}
        problems += [
            f"devices starts a worker process on each GPU of this machine; required without {name}"
            for name, given in other.items()
            if given
        ]
    gpus = worker.gpus_per_trial
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        problems.append(f"gpus_per_trial: required a whole number or a fraction below 1 such as 0.5, got {gpus:g}")
    if worker.worker_minutes != WorkersConfig.worker_minutes and not _has_workers(study):
        problems.append("worker_minutes: this study has no worker processes; add workers, devices or engine ray")
    if (worker.group_size or 1) > 1 and study.engine == "serial":
        problems.append("group_size: engine serial trains one trial after another; use --engine together, auto or ray")
    if (worker.group_size or 1) > 1 and study.race:
        problems.append("race: trials together cannot be stopped one by one; leave group_size out")
    return problems


def _has_workers(study: StudyConfig) -> bool:
    return study.engine == "ray" or study.worker.devices != "one" or study.worker.workers is not None


def _retain_problems(study: StudyConfig) -> list[str]:
    problems: list[str] = []
    for text in study.evaluation.retain_data:
        try:
            RetainedSource.parse(text)
        except ConfigError as error:
            problems.append(str(error))
    if study.evaluation.retain_data and study.data.data.partition(":")[0] == PLANTED:
        problems.append("retain_data: the loss of a planted study is the distance to its teacher; required other data")
    bounds = {name: getattr(study, name) for name in ("max_forgetting", "max_forgetting_percent")}
    given = [name for name, value in bounds.items() if value is not None]
    if len(given) > 1:
        problems.append("max_forgetting and max_forgetting_percent are one bound; required one of them, got both")
    return problems


def load_study(path: str | PathLike[str], overrides: Mapping[str, object] | None = None) -> StudyConfig:
    """Read a study file; command-line options override its settings.

    Raises:
        ConfigError: no path, no such file, not plain YAML (with line), or any wrong setting.
    """
    if not isinstance(path, str | PathLike):
        raise ConfigError(f"required the path of a study file; got {type(path).__name__}.")
    path, overrides = Path(path), overrides or {}
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


def current_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return settings under their present names, and a sentence for each that was renamed.

    Version 0.1 had `scale`, the factor at rank 16, where `alpha` is now, and `scale_policy` where
    `scaling` is. An invalid value is left unchanged, for the parser to refuse.
    """
    found = {name: value for name, value in settings.items() if name not in EARLIER_NAMES}
    said: list[str] = []
    policy = settings.get("scale_policy")
    if policy is not None:
        found["scaling"] = RENAMED.get(str(policy), policy)
        now = "" if found["scaling"] == policy else f": {policy} is {found['scaling']}"
        said.append(f"scale_policy is called scaling now{now}")
    scale = settings.get("scale")
    if scale is None and policy == "rslora" and "alpha" not in settings:
        scale = EARLIER_DEFAULTS["scale"]  # of another alpha than the default of today
    if scale is not None:
        found["alpha"] = _alpha_of(scale, str(found.get("scaling")))
        said.append(f"scale is called alpha now: scale {scale} is alpha {found['alpha']}")
        if "scaling" not in found:
            said.append("scaling is standard by default now; give scaling constant for what scale alone meant before")
    if settings.get("claim_minutes") is not None:
        found["lease_minutes"] = settings["claim_minutes"]
        said.append("claim_minutes is called lease_minutes now")
    if "methods" in found:
        found["methods"] = _current_methods(found["methods"], said)
    return found, said


def _current_methods(methods: Any, said: list[str]) -> Any:
    """Return methods, a text or a list of texts, with the present names of scaling policies."""
    if isinstance(methods, list | tuple):
        return [_current_methods(method, said) for method in methods]
    if not isinstance(methods, str):
        return methods
    for name in dict.fromkeys(match[2] for match in _METHOD_SCALING.finditer(methods)):
        said.append(f"scaling {name} is called {RENAMED[name]} now")
    return _METHOD_SCALING.sub(lambda match: match[1] + RENAMED[match[2]], methods)


def _alpha_of(scale: object, scaling: str) -> object:
    """Return the alpha whose factor at rank 16 is `scale`; a value that is not a number is returned unchanged."""
    try:
        number = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return scale
    if isinstance(scale, bool):
        return scale
    return number * (CONSTANT_AT**0.5 if scaling == "rslora" else CONSTANT_AT)


def earlier_settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of version 0.1 for a study of the same name, one mapping per scaling policy.

    Version 0.1's default policy comes first.
    """
    rest = {name: value for name, value in settings.items() if name not in ("alpha", "scaling")}
    alpha = float(settings.get("alpha", DEFAULT_ALPHA))
    others = [
        {"scale": alpha / CONSTANT_AT, "scale_policy": "constant_alpha_over_r"},
        {"scale": alpha / CONSTANT_AT, "scale_policy": "constant_alpha"},
        {"scale": alpha / CONSTANT_AT**0.5, "scale_policy": "rslora"},
    ]
    return [{**rest, **one} for one in (EARLIER_DEFAULTS, *others)]


def current_label(label: str) -> str:
    """Return a method's label of version 0.1 with the scaling policy's present name."""
    for before, now in RENAMED.items():
        label = re.sub(rf"-{before}(?=[-@]|$)", f"-{now}", label)
    return label
