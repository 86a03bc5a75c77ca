"""A PostgreSQL cluster of the tests' own: in a folder in /tmp, on loopback, gone afterwards."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import free_port

USER = "postgres"
"""Debian's package makes it; PostgreSQL refuses to run as root."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running database server."""

    port: int
    password: str

    @property
    def uri(self) -> str:
        """The database without the password, which goes into PGPASSWORD."""
        return f"postgresql+psycopg2://{USER}@127.0.0.1:{self.port}/postgres"


def _binaries() -> Path:
    """Return the folder of initdb and pg_ctl, or skip the test."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("pg_ctl")
    folders += [Path(on_path).resolve().parent] if on_path else []
    found = next((folder for folder in folders if (folder / "initdb").exists()), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found


@contextmanager
def running_postgres() -> Iterator[Cluster]:
    """Start a cluster with a password; skip where PostgreSQL or its user is missing."""
    binaries, root = _binaries(), os.geteuid() == 0
    if root and subprocess.run(["id", USER], capture_output=True).returncode != 0:
        pytest.skip(f"PostgreSQL refuses to run as root and there is no user '{USER}'")
    who: dict[str, Any] = {"user": USER, "group": USER} if root else {}
    folder = Path(tempfile.mkdtemp(prefix="adaptive-lora-pg-"))  # pytest's are root's alone
    cluster = Cluster(port=free_port(), password=secrets.token_urlsafe(12))
    (folder / "password").write_text(cluster.password)
    if root:
        for path in (folder, folder / "password"):
            shutil.chown(path, USER, USER)

    def run(program: str, *words: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *words]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, **who)

    try:
        login = ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
        run("initdb", f"--username={USER}", "--encoding=UTF8", "--locale=C", *login)
        options = f"-p {cluster.port} -c listen_addresses=127.0.0.1 -k {folder}"
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
        try:
            yield cluster
        finally:
            run("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
