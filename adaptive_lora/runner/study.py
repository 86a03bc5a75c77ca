"""A whole study as one function."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.config import StudyConfig, load_study, study_from
from adaptive_lora.errors import ConfigError, require_extra
from adaptive_lora.runner.early import require_inputs

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_lora.runner.result import StudyResult


def study(
    config: StudyConfig | Mapping[str, Any] | str | PathLike[str], *, console: Console | None = None, **settings: Any
) -> StudyResult:
    """Run a whole study: profile, train, evaluate, compare, register the winner.

    After an interruption the same call continues. Settings of the process, such as MLflow's tracking URI and the
    environment, are as before when it ends.

    Args:
        config: settings by name, as on the command line and in study files; or the path of a study file (YAML or
            JSON); or a configuration.
        console: receives progress and the table; None: nothing is printed.
        **settings: settings that override those of `config`.

    Returns:
        The result: `verdict` in words, `table`, `report()`, the champion.

    Raises:
        ConfigError: a setting is unknown or wrong; all problems at once.
        MissingExtra: `adaptive-lora[study]` is not installed.
        AdaptiveLoraError: the study cannot start; nothing is written then.
    """
    require_extra("study", "adaptive_lora.study")
    made = configured(config, settings)
    require_inputs(made)
    from rich.console import Console

    if not isinstance(console, Console | None):
        raise ConfigError(f"console must be a rich.console.Console or None; got a {type(console).__name__}.")
    from adaptive_lora.runner.guest import unchanged_process
    from adaptive_lora.runner.run import run_study
    from adaptive_lora.tracking.connection import unchanged_mlflow

    with unchanged_process(), unchanged_mlflow(made.tracking):
        return run_study(made, console or Console(quiet=True)).study_result


def ladder(
    config: StudyConfig | Mapping[str, Any] | str | PathLike[str],
    *,
    rank: int,
    console: Console | None = None,
    **settings: Any,
) -> StudyResult:
    """Measure what any allocation of ranks could win: uniform ranks at the budget, and at many times its parameters.

    Args:
        config: as for `study`; its methods give way to uniform.
        rank: rank of uniform at the budget.
        console: receives progress and the table; None: nothing is printed.
        **settings: settings that override those of `config`; `ladder` has the other ranks, by default half, 2, 4 and 16
            times the rank.

    Returns:
        The result of the study; `comparison.ladder` has the bracket.

    Raises:
        ConfigError: as for `study`, and for a ladder that has the rank itself.
    """
    made = configured(config, {"methods": f"uniform:rank={rank}", "baseline": None, **settings})
    rungs = made.ladder or tuple(sorted({max(1, rank // 2), 2 * rank, 4 * rank, 16 * rank} - {rank}))
    return study(study_from({"ladder": rungs}, base=made), console=console)


def configured(
    config: StudyConfig | Mapping[str, Any] | str | PathLike[str], settings: Mapping[str, Any]
) -> StudyConfig:
    """Return a study's configuration with settings that override it.

    Raises:
        ConfigError: a setting is unknown or wrong, or the configuration is no mapping, path or `StudyConfig`.
    """
    if isinstance(config, StudyConfig):
        return study_from(settings, base=config)
    if isinstance(config, Mapping):
        return study_from({**config, **settings})
    if isinstance(config, str | PathLike):
        return load_study(Path(config), settings)
    raise ConfigError(
        "required a study as a dictionary of settings, the path of a study file, or a StudyConfig; got "
        f"{type(config).__name__}."
    )
