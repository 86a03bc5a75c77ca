"""`sync`: delivers results that a tracking server has not received."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, settings_given, study_options
from adaptive_lora.config import study_from

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_lora.tracking.sync import Synced


@main.command()
@click.argument("folder", required=False, metavar="[FOLDER]")
@study_options(only=("tracking_uri",))
def sync(folder: str | None, **options: Any) -> None:
    """Deliver results that the tracking server has not received, for example after an outage.

    FOLDER is a study's output folder [default: adaptive-lora-out]. Everything is read back before
    it is deleted here. May be interrupted and repeated. Exit code 0: everything arrived; 3:
    something is left.
    """
    given = settings_given({**options, "output": folder})
    tracking = study_from(given).tracking
    from adaptive_lora.tracking.sync import sync_folder

    console = make_console()
    outcomes = []
    for outcome in sync_folder(tracking):
        outcomes.append(outcome)
        _say(console, _line(outcome))
    sent, found = (sum(getattr(one, name) for one in outcomes) for name in ("metrics", "found"))
    left = sum(1 for one in outcomes if one.left)
    if not outcomes:
        _say(console, f"nothing is waiting in {Path(tracking.output).absolute()}")
    else:
        _say(console, f"{len(outcomes)} journals, {left} left; metrics sent {sent}, found {found}")
    sys.exit(3 if left else 0)


def _line(one: Synced) -> str:
    state = f"kept in {one.folder}: {one.left}" if one.left else "delivered"
    return f"run {one.run_id or '(none yet)'}  metrics {one.metrics}, found {one.found}  {state}"


def _say(console: Console, text: str) -> None:
    from adaptive_lora.redaction import shown

    console.print(shown(text), highlight=False, soft_wrap=True)
