"""A real tracking server and a real model server, both on this machine only."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from postgres import missing, shared_server
from rich.console import Console
from servers import serving, tracking_words
from tracked import quiet

from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.runner.comparison_input import Selection
from adaptive_lora.runner.run import compare_study
from adaptive_lora.tracking.connection import probe
from adaptive_lora.tracking.registry import adapter_folder

CHAMPION = "models:/adaptive-lora@champion"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    """The shared set-up over PostgreSQL; over SQLite where PostgreSQL is not installed."""
    folder = tmp_path_factory.mktemp("server")
    if missing():
        (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
        words = tracking_words("sqlite:///mlflow.db", folder / "artifacts")
        with serving(words, "/health", folder) as address:
            yield address
    else:
        with shared_server(folder) as address:
            yield address


def post(address: str, body: object) -> tuple[int, object]:
    """Post JSON; return status and parsed answer."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_study_on_a_server_is_served(server: str, make_study: Callable[..., StudyConfig], tmp_path: Path) -> None:
    assert "answers" in probe(TrackingConfig(tracking_uri=server))
    config = make_study(tracking_uri=server, methods="uniform:rank=2", max_steps=2)
    outcome, shown = quiet(config)
    assert outcome.trials_run == 2
    assert outcome.study_result.champion is not None, shown
    again, _ = quiet(config)
    assert again.trials_run == 0

    client = MlflowClient(server)
    runs = client.search_runs([outcome.store.experiment_id])
    assert len(runs) == 3
    assert all(run.info.artifact_uri.startswith("mlflow-artifacts:/") for run in runs)
    champion = client.get_model_version_by_alias("adaptive-lora", "champion")
    model = client.get_logged_model(champion.source.removeprefix("models:/"))
    assert json.loads(model.tags["mlflow.modelVersions"])[0]["name"] == "adaptive-lora"
    scores = {metric.key: metric.value for metric in model.metrics}
    assert scores["test/loss"] == client.get_run(champion.run_id).data.metrics["test/loss"]
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "mlflow.db").exists()
    study_result, _ = compare_study(TrackingConfig(tracking_uri=server), Selection(), {}, Console(file=io.StringIO()))
    assert study_result.champion == outcome.study_result.champion

    assert (adapter_folder(CHAMPION) / "adapter_model.safetensors").is_file()
    rows = [{"instruction": "Swap 7", "input": "red blue"}, {"instruction": "Say hello"}]
    limit = {"max_new_tokens": 6}
    expected = mlflow.pyfunc.load_model(CHAMPION).predict(pd.DataFrame(rows), params=limit)

    words = ["models", "serve", "-m", CHAMPION, "--env-manager", "local", "--workers", "1"]
    extra = {"MLFLOW_TRACKING_URI": server, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with serving(words, "/ping", tmp_path, **extra) as address:
        status, answer = post(f"{address}/invocations", {"dataframe_records": rows, "params": limit})
        assert (status, answer) == (200, {"predictions": expected})
        one = {"dataframe_records": [{"instruction": "Say hello"}]}
        status, answer = post(f"{address}/invocations", one)
        assert status == 200
        assert isinstance(answer, dict)
        assert answer["predictions"][0].startswith(expected[1])
        status, answer = post(f"{address}/invocations", {"dataframe_records": [{"input": "red"}]})
        assert status == 400
        assert "required one of the columns prompt, instruction, messages" in json.dumps(answer)
