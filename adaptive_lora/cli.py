"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora import __version__
from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config import StudyConfig, load_study, option_fields, study_from
from adaptive_lora.errors import AdaptiveLoraError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console


class _Group(click.Group):
    """Turns errors that the user can mend into one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdaptiveLoraError as error:
            click.secho("Error: ", fg="red", err=True, nl=False)
            click.echo(str(error), err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("\nInterrupted; the same command continues where it stopped.", err=True)
            sys.exit(130)


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="adaptive-lora")
def main() -> None:
    """Where should LoRA's ranks go? Measure it on your model and data."""


def _help(field: dataclasses.Field[Any]) -> str:
    unit = f" [unit: {field.metadata['unit']}]" if field.metadata["unit"] else ""
    choices = field.metadata["limits"].choices
    listed = f" [{' | '.join(choices)}]" if choices else ""
    return f"{field.metadata['help']}{listed}{unit} [default: {_shown(field.default)}]"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def study_options(
    *, leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Add an option for every setting of a study; values not given are left to the dataclasses."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, (_, field, _) in reversed(option_fields().items()):
            if name not in leave_out and (not only or name in only):
                flag = f"--{name.replace('_', '-')}"
                function = click.option(flag, name, metavar="VALUE", help=_help(field))(function)
        return function

    return decorate


def _given(options: Mapping[str, Any]) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _study(file: Path | None, options: Mapping[str, Any]) -> StudyConfig:
    given = _given(options)
    if file is not None:
        return load_study(file, given)
    return study_from(given)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


_FILE = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="study file (YAML); options on the command line go over it [default: none]",
)


@main.command()
@_FILE
@study_options()
def study(file: Path | None, **options: Any) -> None:
    """Run a whole study: profile, train, evaluate, compare, register the winner.

    Run the same command again to finish what an interruption left.
    """
    config = _study(file, options)
    from adaptive_lora.study import run_study

    console = _console()
    outcome = run_study(config, console)
    _print_judgement(console, outcome.judgement, outcome.store)


def _print_judgement(console: Console, judgement: Any, store: Any) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"\n[bold]report[/]    {judgement.report.resolve()}")
    if judgement.champion is None:
        say(f"[bold]registry[/]  [red]nothing registered: {judgement.no_champion}[/]")
    else:
        champion = judgement.champion
        say(
            f"[bold]registry[/]  models:/{champion.name}@champion is version {champion.version} "
            f"({judgement.comparison.winner}); reloaded and equal"
        )
    say(f"[bold]tracking[/]  adaptive-lora ui --tracking-uri {store.shown_uri}")


@main.command()
@study_options(only=("model", "revision", "scale"))
@click.option("--method", default="uniform", show_default=True, help="NAME[:option=value,...]")
@click.option("--rank", metavar="R", help="rank of the method [default: the method's own]")
@click.option("--low-rank", metavar="R", help="linear_decay: rank at the low end [default: 4]")
@click.option("--direction", help="linear_decay: down or up [default: down]")
@click.option("--metric", help="empirical: importance metric [default: weight_gradient]")
@click.option("--placement", help="all, attention or feed_forward [default: all]")
@click.option("--target-names", help="only modules of these names, by commas [default: any]")
@click.option(
    "--budget", metavar="N", help="most trainable parameters, or uniform-R [default: none]"
)
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="importance profile (JSON of `profile`), for data-driven methods [default: none]",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def plan(method: str, as_json: bool, profile_file: Path | None, **options: Any) -> None:
    """Show which site gets which rank, and what it costs. Needs no weights."""
    own = {"model", "revision", "scale"}
    config = study_from(_given({key: options[key] for key in own}))
    name, _, rest = method.partition(":")
    written = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    if options["target_names"]:
        options["target_names"] = options["target_names"].replace(",", " ")
    given = _given({key: value for key, value in options.items() if key not in own})
    spec = MethodSpec.build(name, {**written, **given})
    from adaptive_lora.planning import plan_method, print_plan

    report = plan_method(
        config.model, spec, scale=config.train.scale, profile=_read_profile(profile_file)
    )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        print_plan(report, _console())


def _read_profile(path: Path | None) -> Any:
    if path is None:
        return None
    from adaptive_lora.importance import ImportanceProfile

    try:
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error


@main.command()
@_FILE
@study_options(leave_out=("methods", "lr", "baseline"))
@click.option("--metric", default="weight_gradient", show_default=True, help="importance metric")
@click.option("--json", "as_json", is_flag=True, help="print the profile as JSON")
def profile(file: Path | None, metric: str, as_json: bool, **options: Any) -> None:
    """Measure the importance of every site on training examples; feed it to `plan --profile`."""
    config = _study(file, options)
    from adaptive_lora.steps import run_profile

    run_profile(config, metric, _console(), as_json=as_json)


@main.command()
@_FILE
@study_options(leave_out=("methods", "seeds", "baseline"))
@click.option("--method", default="uniform", show_default=True, help="NAME[:option=value,...]")
@click.option("--seed", default="0", show_default=True, help="seed of the trial")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, file_okay=False),
    help="folder to write the adapter to [default: tracking store only]",
)
def train(file: Path | None, method: str, seed: str, adapter: Path | None, **options: Any) -> None:
    """Train one trial: one method, seed and learning rate, as part of its study."""
    config = _study(file, {**options, "methods": method, "seeds": seed})
    from adaptive_lora.steps import run_train

    run_train(config, adapter, _console())


@main.command()
@_FILE
@study_options(leave_out=("methods", "seeds", "lr", "baseline", "model", "revision"))
@click.option("--adapter", help="adapter folder, models:/NAME@champion, or models:/NAME/VERSION")
@click.option("--fold", default=0, show_default=True, help="fold whose test part is scored")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def evaluate(
    file: Path | None, adapter: str | None, fold: int, as_json: bool, **options: Any
) -> None:
    """Score a saved adapter on the test part, loaded the way it is served."""
    config = _study(file, options)
    if not adapter:
        raise ConfigError("evaluate needs --adapter: a folder or a models:/ URI; none was given.")
    from adaptive_lora.steps import run_evaluate

    run_evaluate(config, adapter, fold, _console(), as_json=as_json)


@main.command()
@study_options(
    only=(
        "tracking_uri",
        "experiment",
        "output",
        "registered_model",
        "baseline",
        "margin",
        "correction",
    )
)
@click.option("--study-id", help="id of the study [default: the latest]")
@click.option("--json", "as_json", is_flag=True, help="print the comparison as JSON")
def compare(study_id: str | None, as_json: bool, **options: Any) -> None:
    """Compare the finished trials of a study, write the report, register the winner."""
    given = _given(options)
    tracking = study_from({**given, "baseline": None}).tracking
    from rich.console import Console

    from adaptive_lora.study import compare_study

    console = Console(stderr=True) if as_json else _console()
    judgement, store = compare_study(tracking, study_id, given, console)
    if as_json:
        click.echo(json.dumps(judgement.comparison.to_dict(), indent=1))
    _print_judgement(console, judgement, store)


@main.command()
@study_options(only=("model", "revision", "tracking_uri", "experiment"))
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def doctor(as_json: bool, **options: Any) -> None:
    """Check versions, device, disk, base model and tracking store; exit 0 (fine), 1 or 2."""
    config = study_from(_given(options))
    from adaptive_lora.doctor import diagnose, exit_code, print_findings

    findings = diagnose(config)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(findings, _console())
    sys.exit(exit_code(findings))


@main.command()
@study_options(only=("tracking_uri",))
@click.option("--port", default=5000, show_default=True, help="port on this machine")
def ui(port: int, **options: Any) -> None:
    """Open the MLflow UI on this machine only (127.0.0.1)."""
    config = study_from(_given(options))
    from adaptive_lora.tracking.connection import store_uri

    uri = store_uri(config.tracking)
    if uri.startswith(("http://", "https://")):
        click.echo(f"The tracking server has its own UI: {uri}")
        return
    click.echo(f"MLflow UI: http://127.0.0.1:{port}  (Ctrl-C ends it)")
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


@main.group()
def embedded() -> None:
    """The base model that comes with the package."""


@embedded.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="seed of corpus, weights and order")
@click.option("--steps", type=int, help="optimiser steps [default: as shipped]")
def build(folder: Path, seed: int, steps: int | None) -> None:
    """Make the tokenizer and pretrain the base anew into FOLDER."""
    from adaptive_lora.embedded import build_base

    def show(step: int, loss: float) -> None:
        if step % 50 == 0:
            click.echo(f"step {step}  loss {loss:.4f}")

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give a new folder.")
    extra = {} if steps is None else {"steps": steps}
    build_base(folder, seed=seed, on_step=show, **extra)
    click.echo(f"written to {folder}")


if __name__ == "__main__":
    main()
