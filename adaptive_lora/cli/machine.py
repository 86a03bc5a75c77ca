"""`doctor`, `ui`, `upgrade-store` and `sync`: this machine and its tracking store."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import click

from adaptive_lora.cli.documents import print_document
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import Option, make_console, options, settings, settings_given
from adaptive_lora.config import study_from
from adaptive_lora.config.store_place import require_reachable, sqlite_file, store_uri
from adaptive_lora.errors import ConfigError
from adaptive_lora.redaction import hide_credentials, shown


@main.command()
@options(
    *settings(
        only=("model", "revision", "trust_remote_code", "data", "output", "tracking_uri", "experiment", "ray_address")
    )
)
def doctor(as_json: bool, **given: Any) -> None:
    """Check versions, device, disk, base model, tracking store and Ray; exit 0 (fine), 1 or 2."""
    given = settings_given(given)
    config = study_from({**given, "engine": "ray"} if "ray_address" in given else given)
    from adaptive_lora.cli.doctor import diagnose, exit_code, print_findings

    findings = diagnose(config)
    if as_json:
        print_document("doctor", [dataclasses.asdict(finding) for finding in findings])
    else:
        print_findings(findings, make_console())
    sys.exit(exit_code(findings))


@main.command(extra="study")
@options(
    *settings(only=("tracking_uri",)),
    Option("tracking", "--port", default=5000, show_default=True, help="port on this machine"),
)
def ui(port: int, as_json: bool, **given: Any) -> None:
    """Open the MLflow UI on this machine only (127.0.0.1)."""
    config = study_from(settings_given(given))
    require_reachable(config.tracking)
    uri = store_uri(config.tracking)
    if uri.startswith(("http://", "https://")):
        click.echo(f"The tracking server has its own UI: {hide_credentials(uri)}")
        if as_json:
            print_document("ui", {"url": hide_credentials(uri), "started": False})
        return
    if sqlite_file(uri) is not None:
        from adaptive_lora.tracking.connection import reach

        reach(uri)  # created completely if missing: MLflow's own server could be stopped halfway
    address = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    click.echo(f"MLflow UI: {address}  (Ctrl-C ends it)")
    click.echo(
        "Only this machine reaches it. To share it, start entrypoints/server/start.sh with "
        "AUTH=basic and ALLOWED_HOSTS instead."
    )
    if as_json:
        print_document("ui", {"url": address, "started": True})
        os.dup2(2, 1)  # standard output of the server, which replaces this process
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


@main.command("upgrade-store", extra="study")
@options(*settings(only=("tracking_uri",)))
def upgrade_store(as_json: bool, **given: Any) -> None:
    """Upgrade a SQLite tracking store that an earlier MLflow made; a backup is kept beside it."""
    config = study_from(settings_given(given))
    require_reachable(config.tracking)
    uri = store_uri(config.tracking)
    from adaptive_lora.tracking.create import upgrade

    backup = upgrade(uri)
    if backup is None:
        click.echo(f"{hide_credentials(uri)} needs no upgrade")
    else:
        click.echo(f"{hide_credentials(uri)} is upgraded; the backup is {backup}")
    if as_json:
        print_document(
            "upgrade-store",
            {
                "tracking_uri": hide_credentials(uri),
                "upgraded": backup is not None,
                "backup": None if backup is None else str(backup),
            },
        )


@main.command(extra="study")
@click.argument("folder", required=False, metavar="[FOLDER]")
@options(*settings(only=("tracking_uri",)))
def sync(folder: str | None, as_json: bool, **given: Any) -> None:
    """Deliver results that the tracking server has not received, for example after an outage.

    FOLDER is a study's output folder [default: adaptive-lora-out]. Everything is read back before
    it is deleted here. May be interrupted and repeated. Exit code 0: everything arrived; 3:
    something is left.
    """
    tracking = study_from(settings_given({**given, "output": folder})).tracking
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"folder {folder} does not exist; required the output folder of a study.")
    from adaptive_lora.tracking.sync import sync_folder

    console = make_console()

    def say(text: str) -> None:
        console.print(shown(text), highlight=False, soft_wrap=True)

    outcomes = []
    for one in sync_folder(tracking):
        outcomes.append(one)
        state = f"kept in {one.folder}: {one.left}" if one.left else "delivered"
        say(f"run {one.run_id or '(none yet)'}  metrics {one.metrics}, found {one.found}  {state}")
    left = sum(1 for one in outcomes if one.left)
    if outcomes:
        sent, found = sum(one.metrics for one in outcomes), sum(one.found for one in outcomes)
        say(f"{len(outcomes)} journals, {left} left; metrics sent {sent}, found {found}")
    else:
        say(f"nothing is waiting in {Path(tracking.output).absolute()}")
    if as_json:
        journals = [{**dataclasses.asdict(one), "folder": str(one.folder)} for one in outcomes]
        print_document("sync", {"journals": journals, "left": left})
    sys.exit(3 if left else 0)
