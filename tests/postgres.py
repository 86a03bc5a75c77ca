"""A PostgreSQL cluster of the tests' own: in a folder in /tmp, on loopback, gone afterwards."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from servers import MlflowProcess, free_port

START = Path(__file__).resolve().parents[1] / "entrypoints" / "server" / "start.sh"
USER = "postgres"
"""Debian's package makes it; PostgreSQL refuses to run as root."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running database server."""

    port: int
    password: str
    crash: Callable[[], None]
    """Ends it in the middle of what it is doing, and starts it again."""

    @property
    def uri(self) -> str:
        """The database without the password, which goes into PGPASSWORD."""
        return f"postgresql+psycopg2://{USER}@127.0.0.1:{self.port}/postgres"


def _binaries() -> Path | None:
    """Return the folder of initdb and pg_ctl."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("pg_ctl")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def missing() -> str:
    """Return what is missing for a cluster; empty where nothing is."""
    if _binaries() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and subprocess.run(["id", USER], capture_output=True).returncode != 0:
        return f"PostgreSQL refuses to run as root and there is no user '{USER}'"
    return ""


@contextmanager
def shared_server(folder: Path) -> Iterator[str]:
    """Start the shared set-up as its script does; yield its address."""
    with running_postgres() as database, served(folder, database) as address:
        yield address


@contextmanager
def served(folder: Path, database: Cluster) -> Iterator[str]:
    """Start the server over a database; yield its address."""
    extra = {"BACKEND": database.uri, "PGPASSWORD": database.password, "WORKERS": "2"}
    server = MlflowProcess([str(START)], "/health", folder, **extra)
    try:
        yield server.address
    finally:
        server.stop()


@contextmanager
def running_postgres() -> Iterator[Cluster]:
    """Start a cluster with a password; skip where PostgreSQL or its user is missing."""
    if lacking := missing():
        pytest.skip(lacking)
    binaries, root = _binaries(), os.geteuid() == 0
    assert binaries is not None
    who: dict[str, Any] = {"user": USER, "group": USER} if root else {}
    folder = Path(tempfile.mkdtemp(prefix="adaptive-lora-pg-"))  # pytest's are root's alone
    port, password = free_port(), secrets.token_urlsafe(12)
    (folder / "password").write_text(password)
    if root:
        for path in (folder, folder / "password"):
            shutil.chown(path, USER, USER)

    def run(program: str, *words: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *words]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, **who)

    try:
        login = ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
        run("initdb", f"--username={USER}", "--encoding=UTF8", "--locale=C", *login)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
        how = ("-w", "-l", str(folder / "log"), "-o", options)
        run("pg_ctl", "start", *how)
        crash = partial(run, "pg_ctl", "restart", "-m", "immediate", *how)
        try:
            yield Cluster(port=port, password=password, crash=crash)
        finally:
            run("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
