"""`doctor` and `ui`: this machine and its tracking store."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import click

from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, settings_given, study_options
from adaptive_lora.config import study_from
from adaptive_lora.config.store_place import require_reachable, sqlite_file, store_uri
from adaptive_lora.redaction import hide_credentials


@main.command()
@study_options(only=("model", "revision", "trust_remote_code", "data", "output", "tracking_uri", "experiment"))
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def doctor(as_json: bool, **options: Any) -> None:
    """Check versions, device, disk, base model and tracking store; exit 0 (fine), 1 or 2."""
    config = study_from(settings_given(options))
    from adaptive_lora.cli.doctor import diagnose, exit_code, print_findings

    findings = diagnose(config)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(findings, make_console())
    sys.exit(exit_code(findings))


@main.command()
@study_options(only=("tracking_uri",))
@click.option("--port", default=5000, show_default=True, help="port on this machine")
def ui(port: int, **options: Any) -> None:
    """Open the MLflow UI on this machine only (127.0.0.1)."""
    config = study_from(settings_given(options))
    require_reachable(config.tracking)
    uri = store_uri(config.tracking)
    if uri.startswith(("http://", "https://")):
        click.echo(f"The tracking server has its own UI: {hide_credentials(uri)}")
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
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


@main.command("upgrade-store")
@study_options(only=("tracking_uri",))
def upgrade_store(**options: Any) -> None:
    """Upgrade a SQLite tracking store that an earlier MLflow made; a backup is kept beside it."""
    config = study_from(settings_given(options))
    require_reachable(config.tracking)
    uri = store_uri(config.tracking)
    from adaptive_lora.tracking.create import upgrade

    backup = upgrade(uri)
    if backup is None:
        click.echo(f"{hide_credentials(uri)} needs no upgrade")
    else:
        click.echo(f"{hide_credentials(uri)} is upgraded; the backup is {backup}")
