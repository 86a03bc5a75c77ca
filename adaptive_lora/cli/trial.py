"""`train`, `evaluate` and `export`: one trial, one adapter."""

from __future__ import annotations

import dataclasses
from math import isfinite
from pathlib import Path
from typing import Any

import click

from adaptive_lora.cli.documents import print_document
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import (
    RETENTION,
    STUDY_FILE,
    WORKERS,
    Option,
    make_console,
    method_option,
    options,
    read_study,
    settings,
    settings_given,
)
from adaptive_lora.config import DataConfig, RetainedSource, study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.errors import ConfigError
from adaptive_lora.redaction import shown
from adaptive_lora.runner.early import require_data, require_inputs


@main.command(extra="study")
@options(
    STUDY_FILE,
    method_option("uniform"),
    Option("study", "--seed", default="0", show_default=True, metavar="INTEGER", help="seed of the trial"),
    *settings(leave_out=("methods", "seeds", "baseline", "race", *WORKERS)),
    Option(
        "where",
        "--adapter",
        type=click.Path(path_type=Path, file_okay=False),
        help="folder to write the adapter to [default: tracking store only]",
    ),
)
def train(file: Path | None, method: str, seed: str, adapter: Path | None, as_json: bool, **given: Any) -> None:
    """Train one trial: one method, seed and learning rate, as part of its study."""
    if given["engine"] == "ray":
        raise ConfigError("train runs one trial in this process; leave --engine ray out, or use `study` for workers.")
    config = read_study(file, {**given, "methods": method, "seeds": seed})
    config.only_trial()
    require_inputs(config)
    from adaptive_lora.runner.steps import run_train

    trained = run_train(config, adapter, make_console())
    if as_json:
        print_document(
            "train",
            {
                "study_id": trained.study_id,
                "run_id": trained.run_id,
                "trial": trained.trial,
                "trained": trained.outcome is not None,
                "adapter": None if adapter is None else str(adapter),
                "metrics": {name: value if isfinite(value) else None for name, value in trained.metrics.items()},
            },
        )


@main.command(extra="study")
@click.argument("place", metavar="[ADAPTER]", required=False)
@options(
    STUDY_FILE,
    Option(
        "model",
        "--adapter",
        metavar="DIRECTORY|URI",
        help="adapter folder, models:/NAME@champion, or models:/NAME/VERSION, if not ADAPTER [default: none]",
    ),
    *settings(leave_out=("methods", "seeds", "lr", "baseline", "model", "revision", "wait", *WORKERS, *RETENTION[1:])),
    Option("evaluation", "--fold", default=0, show_default=True, help="fold whose test split is scored"),
)
def evaluate(place: str | None, file: Path | None, adapter: str | None, fold: int, as_json: bool, **given: Any) -> None:
    """Score a saved adapter on the test split, loaded as for serving.

    With --retain-data, score it and its base on other data instead; with --data as well, both.
    """
    config = read_study(file, given)
    if place and adapter:
        raise ConfigError(f"evaluate scores one adapter; got {place} and --adapter {adapter}.")
    adapter = place or adapter
    if not adapter:
        raise ConfigError("evaluate needs --adapter: a folder or a models:/ URI; none was given.")
    retained = config.evaluation.retain_data
    tested = not retained or given["data"] is not None or config.data.data != DataConfig.data
    sources = [RetainedSource.parse(text).settings(config.data) for text in retained]
    for source in ([config.data] if tested else []) + sources:
        require_data(config, source, is_known=False)
    require_reachable(config.tracking)
    from adaptive_lora.runner.steps import run_evaluate, run_evaluate_retained

    console = make_console()
    document: dict[str, Any] = {}
    if tested:
        document = run_evaluate(study_from({**config.flat(), "retain_data": []}), adapter, fold, console)
    if retained:
        document["retained"] = [one.to_dict() for one in run_evaluate_retained(config, adapter, console)]
    if as_json:
        print_document("evaluate", document)


@main.command(extra="study")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@options(
    *settings(only=("tracking_uri", "trust_remote_code")),
    Option("output", "--uniform", is_flag=True, help="one rank, scale 1: for servers with one alpha / r"),
    Option("output", "--merged", is_flag=True, help="the base with the adapter in its weights"),
    Option("hub", "--push", "repository", metavar="ORG/NAME", help="publish on the Hugging Face hub [default: none]"),
    Option("hub", "--public", is_flag=True, help="everybody can read it; a repository that exists stays as it is"),
    Option("hub", "--revision", metavar="BRANCH", help="branch to commit to, created if missing [default: main]"),
    Option("hub", "--commit-message", "message", metavar="TEXT", help="title of the commit [default: the method]"),
    Option("hub", "--license", metavar="NAME", help="the hub's name of its licence, for the card [default: not given]"),
    Option("hub", "--update", is_flag=True, help="replace the adapter or model that the branch has; other files stay"),
)
def export(
    adapter: str,
    out: Path | None,
    uniform: bool,
    merged: bool,
    repository: str | None,
    as_json: bool,
    tracking_uri: str | None,
    trust_remote_code: str | None,
    **pushed: Any,
) -> None:
    """Write ADAPTER (a folder or models:/ URI) to the new folder OUT, or push it to the Hugging Face hub.

    A push takes the adapter as trained, unless --uniform or --merged is given, and the token of HF_TOKEN or
    `hf auth login`. A new repository is private.
    """
    form = "merged" if merged else "uniform" if uniform else "trained"
    shared = settings_given({"tracking_uri": tracking_uri, "trust_remote_code": trust_remote_code})
    if repository is not None:
        if out is not None or (uniform and merged):
            what = f"the folder {out} and --push" if out is not None else "--uniform and --merged"
            raise ConfigError(f"export does one thing at a time: got {what}; give one of them.")
        from adaptive_lora.runner.push import push

        done = push(adapter, repository, form=form, **pushed, **shared)
        make_console().print(shown("\n".join(done.lines())), highlight=False, soft_wrap=True)
        if as_json:
            print_document("export", {"folder": None, "form": form, "rank": None, "pushed": dataclasses.asdict(done)})
        return
    config = study_from(shared)
    unused = sorted(name.replace("message", "commit-message") for name, value in pushed.items() if value)
    if unused:
        raise ConfigError(f"--{unused[0]} is for --push ORG/NAME, which was not given.")
    if out is None:
        raise ConfigError("export needs a folder OUT, or --push ORG/NAME; neither was given.")
    if uniform == merged:
        raise ConfigError("export needs exactly one of --uniform and --merged.")
    from adaptive_lora.runner.steps import run_export

    rank = run_export(config, adapter, out, make_console(), merged=merged)
    if as_json:
        print_document("export", {"folder": str(out), "form": form, "rank": rank, "pushed": None})
