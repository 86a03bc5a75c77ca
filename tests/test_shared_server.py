"""The shared set-up: `mlflow server` over PostgreSQL as its script starts it, and many writers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_cli
from packaging.requirements import Requirement
from postgres import START, running_postgres, served, shared_server
from servers import MlflowProcess
from test_kill import make_place, survive
from test_leases import begin_at_once
from zygote import Zygote

from adaptive_lora.cli import main
from adaptive_lora.config import TrackingConfig
from adaptive_lora.tracking import Recorder, StudyRun, connect

__all__ = ["make_place"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "entrypoints" / "server"
sys.path.insert(0, str(ROOT / "tests" / "bench"))
from concurrent_writers import Outcome, write_together  # noqa: E402


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The shared set-up as its script starts it."""
    with shared_server(tmp_path_factory.mktemp("shared")) as address:
        yield address


def whole(outcome: Outcome) -> None:
    """Check that nothing is missing."""
    assert outcome.problems == ()
    assert outcome.metrics_found == outcome.metrics_sent == outcome.runs * 120


def test_writers_at_once_lose_nothing_on_the_shared_server(shared: str, tmp_path: Path) -> None:
    whole(write_together(shared, tmp_path / "out", writers=4, runs=24))
    client = MlflowClient(shared)
    experiment = client.get_experiment_by_name("writers")
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:/")


def test_writers_at_once_do_not_lock_each_other_out_of_sqlite(
    empty_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    whole(write_together(uri, tmp_path / "out", writers=3, runs=12))
    assert "locked" not in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("place", ["server", "sqlite"])
def test_eight_writers_at_once(
    place: str, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    if place == "server":
        uri = request.getfixturevalue("shared")
    outcome = write_together(uri, tmp_path / "out", writers=8, runs=200)
    whole(outcome)
    assert "locked" not in capfd.readouterr().err
    with capfd.disabled():
        print(f"\n{place}: {outcome}")


def test_commands_that_begin_at_once_on_the_shared_server_follow_each_other(shared: str, tmp_path: Path) -> None:
    """Requests take longer there than the moment after which a lease is read back."""

    def open_one(signature: str, wait: bool) -> StudyRun:
        store = connect(TrackingConfig(tracking_uri=shared, output=str(tmp_path)))
        return StudyRun.open(store, study_id="at-once", name="at once", signature=signature, wait=wait)

    begin_at_once(open_one, ["", "a", "b", ""])


@pytest.mark.long
def test_a_study_killed_again_and_again_on_the_shared_server(zygote: Zygote, make_place: Any, shared: str) -> None:
    survive(zygote, partial(make_place, server=shared), kills=20, seed=2)


@pytest.mark.long
def test_writers_outlast_a_database_that_crashes(tmp_path: Path) -> None:
    """PostgreSQL ends in the middle of what it was doing, and recovers, again and again."""
    crashes = 6
    with running_postgres() as database, served(tmp_path, database) as address:

        def begun() -> set[str]:
            experiment = MlflowClient(address).get_experiment_by_name("writers")
            runs = MlflowClient(address).search_runs([experiment.experiment_id] if experiment else [])
            return {run.data.tags["seed"] for run in runs if "seed" in run.data.tags}

        def misfortunes() -> None:
            while not begun() >= {"0", "1", "2", "3"}:  # each writer is at its first run
                time.sleep(0.5)
            for _ in range(crashes):
                database.crash()
                time.sleep(3)

        with ThreadPoolExecutor(1) as fate:
            done = fate.submit(misfortunes)
            outcome = write_together(address, tmp_path / "out", writers=4, runs=60)
            done.result()
    whole(outcome)
    print(f"{crashes} crashes: {outcome}")


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A server with users and passwords."""

    address: str
    password: str


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    """The script's server with basic authentication and a list of names."""
    folder = tmp_path_factory.mktemp("closed")
    password = "a long passphrase of the admin"
    extra = {
        "BACKEND": f"sqlite:///{folder / 'mlflow.db'}",
        "AUTH": "basic",
        "WORKERS": "1",
        "ALLOWED_HOSTS": "127.0.0.1:*",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "0" * 64,
    }
    server = MlflowProcess([str(START)], "/health", folder, **extra)
    yield Closed(address=server.address, password=password)
    server.stop()


def status_of(address: str, **headers: str) -> int:
    """Return the status of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_closed_server_wants_a_password_and_a_known_name(
    closed: Closed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = f"{closed.address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert status_of(call) == 401
    assert status_of(call, Host="evil.example") == 403
    refused = CliRunner().invoke(main, ["compare", f"--tracking-uri={closed.address}", f"--output={tmp_path}"])
    assert refused.exit_code == 2
    assert "MLFLOW_TRACKING_USERNAME" in refused.output

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", closed.password)
    store = connect(TrackingConfig(tracking_uri=closed.address, output=str(tmp_path / "out")))
    run = Recorder.begin(store, "mine", {})
    run.metric("a", 1.0)
    run.params({"note": f"the password is {closed.password}"})
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"mine" in written
    assert closed.password.encode() not in written
    run.end("FINISHED")
    store.settle()
    store.close()
    assert store.client.get_run(run.run_id).data.metrics == {"a": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set BACKEND"),
        ({"BACKEND": "sqlite:///x.db", "HOST": "0.0.0.0"}, "set AUTH=basic"),
        ({"BACKEND": "sqlite:///x.db", "HOST": "0.0.0.0", "AUTH": "basic"}, "set ALLOWED_HOSTS"),
        ({"BACKEND": "sqlite:///x.db", "AUTH": "basic"}, "set MLFLOW_FLASK_SERVER_SECRET_KEY"),
        ({"BACKEND": "sqlite:///x.db", "AUTH": "yes"}, "AUTH is 'basic' or not set"),
    ],
)
def test_the_script_does_not_open_a_server_to_others_by_accident(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], **settings}
    done = subprocess.run([str(START)], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert not list(tmp_path.iterdir())


def test_the_compose_file_is_the_script_in_containers() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    assert set(services) == {"database", "mlflow"}
    for service in services.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        named = {volume.partition(":")[0] for volume in service["volumes"]}
        assert named <= set(compose["volumes"])
    assert set(services["mlflow"]["depends_on"]) == {"database"}
    recipe = services["mlflow"]["build"]["dockerfile_inline"]
    pins = {
        Requirement(line).name: line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    for name, pinned in re.findall(r"([\w-]+)==([\w.]+)", recipe):
        assert pins[name] == f"{name}=={pinned}"
    known = {option for param in mlflow_cli.commands["server"].params for option in param.opts}
    for text in (services["mlflow"]["command"], START.read_text(encoding="utf-8")):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


ECHO = """#!/bin/sh
echo "$@"
echo "$MLFLOW_BACKEND_STORE_URI"
echo "$MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
"""


def options_of(words: list[str]) -> dict[str, str]:
    """Return option -> value of `mlflow server`'s words; flags have none."""
    text = " ".join(words)
    found = re.findall(r"(--[a-z-]+)(?: (?!--)(\S+))?", text)
    assert len(found) == text.count("--")
    return dict(found)


def test_the_script_and_the_compose_file_start_the_same_server(tmp_path: Path) -> None:
    """All but where it listens: a container's port is published on loopback alone."""
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["mlflow"]
    program, first, *words = service["command"].split()
    contained = options_of(words)
    (tmp_path / "mlflow").write_text(ECHO)
    (tmp_path / "mlflow").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BACKEND": service["environment"]["MLFLOW_BACKEND_STORE_URI"],
        "ARTIFACTS": "/artifacts",
        "ALLOWED_HOSTS": contained["--allowed-hosts"],
    }
    done = subprocess.run([str(START)], env=environment, capture_output=True, text=True, check=True)
    called, backend, jobs = done.stdout.splitlines()
    assert (program, first) == ("mlflow", called.split()[0])
    scripted = options_of(called.split()[1:])
    assert (scripted.pop("--host"), contained.pop("--host")) == ("127.0.0.1", "0.0.0.0")
    assert scripted == contained
    assert backend == service["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert jobs == service["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]
    assert service["ports"] == ["127.0.0.1:5000:5000"]
