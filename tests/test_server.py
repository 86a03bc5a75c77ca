"""A real tracking server and a real model server, both on this machine only."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from rich.console import Console
from tracked import quiet

from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.dossier import Selection
from adaptive_lora.study import compare_study
from adaptive_lora.tracking.connection import probe
from adaptive_lora.tracking.registry import adapter_folder

CHAMPION = "models:/adaptive-lora@champion"
PATIENCE = 120.0
"""Seconds after which a server is given up."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(words: list[str], port: int, path: str, folder: Path, **extra: str) -> Iterator[str]:
    """Run an `mlflow` command that serves; yield its address once `path` answers."""
    log = folder / f"{words[0]}.log"
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**environment, **extra},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}{path}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"{address} does not answer:\n{log.read_text(encoding='utf-8', errors='replace')}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    """A tracking server with its database and artifacts in its own folder."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    words = ["server", "--backend-store-uri", "sqlite:///mlflow.db", "--workers", "1"]
    words += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    with serving(words, free_port(), "/health", folder) as address:
        yield address


def post(address: str, body: object) -> tuple[int, object]:
    """Post JSON; return status and parsed answer."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_study_on_a_server_is_served(
    server: str, make_study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    assert "answers" in probe(TrackingConfig(tracking_uri=server))
    config = make_study(tracking_uri=server, methods="uniform:rank=2", max_steps=2)
    outcome, shown = quiet(config)
    assert outcome.trials_run == 2
    assert outcome.judgement.champion is not None, shown
    again, _ = quiet(config)
    assert again.trials_run == 0

    client = MlflowClient(server)
    runs = client.search_runs([outcome.store.experiment_id])
    assert len(runs) == 3
    assert all(run.info.artifact_uri.startswith("mlflow-artifacts:/") for run in runs)
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "mlflow.db").exists()
    judgement, _ = compare_study(
        TrackingConfig(tracking_uri=server), Selection(), {}, Console(file=io.StringIO())
    )
    assert judgement.champion == outcome.judgement.champion

    assert (adapter_folder(CHAMPION) / "adapter_model.safetensors").is_file()
    rows = [{"instruction": "Swap 7", "input": "red blue"}, {"instruction": "Say hello"}]
    limit = {"max_new_tokens": 6}
    expected = mlflow.pyfunc.load_model(CHAMPION).predict(pd.DataFrame(rows), params=limit)

    words = ["models", "serve", "-m", CHAMPION, "--env-manager", "local", "--workers", "1"]
    extra = {"MLFLOW_TRACKING_URI": server, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with serving(words, free_port(), "/ping", tmp_path, **extra) as address:
        status, answer = post(
            f"{address}/invocations", {"dataframe_records": rows, "params": limit}
        )
        assert (status, answer) == (200, {"predictions": expected})
        one = {"dataframe_records": [{"instruction": "Say hello"}]}
        status, answer = post(f"{address}/invocations", one)
        assert status == 200
        assert isinstance(answer, dict)
        assert answer["predictions"][0].startswith(expected[1])
        status, answer = post(f"{address}/invocations", {"dataframe_records": [{"input": "red"}]})
        assert status == 400
        assert "required a column 'prompt' or 'instruction'" in json.dumps(answer)
