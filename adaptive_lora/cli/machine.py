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
from adaptive_lora.redaction import hide_credentials


@main.command()
@study_options(
    only=("model", "revision", "trust_remote_code", "data", "output", "tracking_uri", "experiment")
)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def doctor(as_json: bool, **options: Any) -> None:
    """Check versions, device, disk, base model and tracking store; exit 0 (fine), 1 or 2."""
    config = study_from(settings_given(options))
    from adaptive_lora.doctor import diagnose, exit_code, print_findings

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
    from adaptive_lora.tracking.connection import store_uri

    uri = store_uri(config.tracking)
    if uri.startswith(("http://", "https://")):
        click.echo(f"The tracking server has its own UI: {hide_credentials(uri)}")
        return
    address = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    click.echo(f"MLflow UI: {address}  (Ctrl-C ends it)")
    click.echo(
        "Only this machine reaches it. To share it, start entrypoints/server/start.sh with "
        "AUTH=basic and ALLOWED_HOSTS instead."
    )
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])
