"""`compare`: verdicts on trials of studies, and on runs that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from adaptive_lora.cli.documents import print_document
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import Option, make_console, options, settings, settings_given
from adaptive_lora.cli.study import print_result
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.errors import ConfigError
from adaptive_lora.redaction import shown

_RUNS = (
    Option(
        "runs",
        "--runs",
        metavar="FILE",
        help="table with columns method, seed, score and, if there are, example, budget, rate, validation (CSV, TSV, "
        "JSON, JSON Lines, Parquet) [default: none]",
    ),
    Option(
        "runs",
        "--lm-eval",
        multiple=True,
        metavar="[NAME[:SEED]=]FOLDER",
        help="output of lm-evaluation-harness with --log_samples; given once per run [default: none]",
    ),
    Option(
        "runs",
        "--mlflow-query",
        metavar="FILTER",
        help='filter of runs in MLflow\'s syntax, "" for all, in the experiments of --experiment (several with commas) '
        "or in all; --columns names what is read [default: none]",
    ),
    Option(
        "runs",
        "--columns",
        metavar="ROLE=NAME,...",
        help="columns that have other names, such as method=model,score=accuracy; of MLflow runs metrics.NAME, "
        "params.NAME or tags.NAME [default: none]",
    ),
    Option(
        "runs",
        "--higher-is-better/--lower-is-better",
        "higher_is_better",
        is_flag=True,
        default=None,
        help="direction of the score [default: by its name, or by its lm-eval task]",
    ),
    *(
        Option(
            "runs",
            f"--{name}",
            f"{name}s",
            multiple=True,
            metavar="NAME",
            help=f"{text}; may be repeated [default: {default}]",
        )
        for name, text, default in (
            ("task", "lm-eval task", "all that the runs share"),
            ("filter", "lm-eval filter", "the first of each task"),
            ("metric", "lm-eval metric", "the first of each task that is a mean over its examples"),
        )
    ),
)
_SOURCES = {"runs": "--runs", "lm_eval": "--lm-eval", "mlflow_query": "--mlflow-query"}
"""Parameter -> option that gives runs made elsewhere."""
_OF_RUNS = {"columns", "higher_is_better", "tasks", "filters", "metrics"}
"""Parameters that only runs made elsewhere have."""
_FOR_RUNS = {"baseline", "margin", "correction", "output"}
"""Study settings that runs made elsewhere have too; with --mlflow-query, the store's as well."""

_COMPARED = (
    "tracking_uri", "experiment", "output", "registered_model", "trust_remote_code", "baseline", "margin",
    "margin_percent", "correction", "max_forgetting", "max_forgetting_percent",
)  # fmt: skip
"""Study settings that affect a comparison."""


@main.command(extra="study")
@options(
    Option(
        "study",
        "--study-id",
        "study_ids",
        multiple=True,
        metavar="ID",
        help="ids of studies [default: the latest study]",
    ),
    Option(
        "study",
        "--query",
        metavar="FILTER",
        help="filter of trials in MLflow's syntax, such as \"tags.data = 'rows.json'\" [default: none]",
    ),
    Option(
        "study",
        "--allow-mixed",
        is_flag=False,
        flag_value="true",
        type=bool,
        default="false",
        help="compare across data sets, splits and bases, pairing only within each [default: false]",
    ),
    *_RUNS,
    *settings(only=_COMPARED),
)
def compare(study_ids: tuple[str, ...], query: str | None, allow_mixed: bool, as_json: bool, **given: Any) -> None:
    """Compare finished trials, write the report, register the winner.

    Everything is read from the tracking store, also trials that others ran. Only the proof before
    a registration needs the base model and the data.

    With --runs, --lm-eval or --mlflow-query, runs that were made elsewhere are compared: a report is
    written, and nothing is registered.
    """
    given = settings_given(given)
    elsewhere = {name: given.pop(name) for name in (*_SOURCES, *_OF_RUNS) if name in given}
    elsewhere = {name: value for name, value in elsewhere.items() if value != ()}
    if elsewhere:
        selected = {"--study-id": study_ids, "--query": query is not None, "--allow-mixed": allow_mixed}
        _compare_runs(elsewhere, given, [name for name, value in selected.items() if value], as_json)
        return
    tracking = study_from({**given, "baseline": None}).tracking
    require_reachable(tracking, must_exist=True)
    from adaptive_lora.runner.comparison_input import Selection
    from adaptive_lora.runner.run import compare_study

    console = make_console()
    selection = Selection(
        study_ids=tuple(" ".join(study_ids).replace(",", " ").split()), query=query, allow_mixed=allow_mixed
    )
    result, _ = compare_study(tracking, selection, given, console)
    print_result(console, result)
    if as_json:
        print_document("compare", result.to_dict())


def _compare_runs(elsewhere: Mapping[str, Any], given: Mapping[str, Any], selected: list[str], as_json: bool) -> None:
    """Compare runs that were made elsewhere, print the verdict and write the report."""
    sources = [name for name in _SOURCES if name in elsewhere]
    if len(sources) != 1:
        named = " and ".join(_SOURCES[name] for name in sources) or "none"
        raise ConfigError(f"runs made elsewhere: required one of {', '.join(_SOURCES.values())}, got {named}.")
    (source,) = sources
    used = _FOR_RUNS | ({"tracking_uri", "experiment"} if source == "mlflow_query" else set())
    if unused := [*selected, *(f"--{name.replace('_', '-')}" for name in given if name not in used)]:
        raise ConfigError(f"{', '.join(unused)}: not used with {_SOURCES[source]}; leave it out.")
    config = study_from({name: value for name, value in given.items() if name != "baseline"})
    click.get_current_context().find_root().obj = config.tracking.output
    from adaptive_lora.analysis.report import render_terminal
    from adaptive_lora.analysis.runs.compare import compare as compare_runs

    result = compare_runs(
        _runs(source, elsewhere[source], config, given),
        baseline=given.get("baseline"),
        columns=_columns(elsewhere.get("columns", "")),
        margin=config.margin,
        correction=config.correction,
        output=config.tracking.output,
        **{name: value for name, value in elsewhere.items() if name in _OF_RUNS - {"columns"}},
    )
    console = make_console()
    for line in (line for lines in result.about.data.values() for line in lines):
        console.print(shown(line), highlight=False, soft_wrap=True)
    render_terminal(result.comparison, console)
    console.print(f"\n[bold]report[/]    {shown(result.report().resolve())}", highlight=False, soft_wrap=True)
    if as_json:
        print_document("compare", result.to_dict())


def _runs(source: str, value: Any, config: StudyConfig, given: Mapping[str, Any]) -> Any:
    """Return the runs of a source as `compare` of the public API takes them."""
    if source == "runs":
        if Path(value).is_dir():
            raise ConfigError(f"--runs {value} is a folder; required a table. Folders of lm-eval are for --lm-eval.")
        return Path(value)
    if source == "lm_eval":
        return list(value)
    require_reachable(config.tracking, must_exist=True)
    from adaptive_lora.tracking import find_runs

    return find_runs(config.tracking, value, given.get("experiment"))


def _columns(text: str) -> dict[str, str]:
    """Return role -> column of `--columns`."""
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, name = part.partition("=")
        if not equals or not name.strip() or role.strip() in columns:
            raise ConfigError(f"--columns: required ROLE=NAME, each role once, got '{part:.80}'.")
        columns[role.strip()] = name.strip()
    return columns
