"""Stores that cannot be used, and credentials that nobody sees."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from tracked import store_in, words_of

from adaptive_lora.cli import main
from adaptive_lora.config import TrackingConfig
from adaptive_lora.errors import TrackingError
from adaptive_lora.runner.trial_log import trial_parameters
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.connection import hide_credentials

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (f"http://user:{SECRET}@127.0.0.1:PORT", "127.0.0.1"),
        (f"postgresql://user:{SECRET}@127.0.0.1:PORT/mlflow", "postgresql://"),
        ("nonsense://somewhere", "nonsense"),
        ("sqlite:///rows.json/mlflow.db", "rows.json"),
        ("sqlite:///rows.json", "rows.json is no SQLite database"),
    ],
)
def test_unusable_store_is_one_clear_error(uri: str, words: str, options: dict[str, object], tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = uri.replace("PORT", str(closed.getsockname()[1]))
    started = time.monotonic()
    result = CliRunner().invoke(main, ["study", *words_of({**options, "tracking_uri": uri})])
    assert time.monotonic() - started < 30
    assert result.exit_code == 2
    assert "cannot be used" in result.output
    assert words in result.output
    assert SECRET not in result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json"]


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://user:{SECRET}@127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match="cannot be used") as caught:
            connect(TrackingConfig(tracking_uri=uri))
        assert time.monotonic() - started < 30
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h:5000/x", "http://***@h:5000/x"),
        ("http://u:p@ss@h:5000", "http://***@h:5000"),
        ("see postgresql://u:p@/db now", "see postgresql://***@/db now"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("models:/name@champion", "models:/name@champion"),
    ],
)
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert hide_credentials(text) == shown


def test_no_credentials_in_what_a_study_records(make_bench: Callable[..., Any]) -> None:
    context = make_bench(tracking_uri=f"http://user:{SECRET}@127.0.0.1:1")
    assert SECRET not in json.dumps(context.settings())
    trial = next(iter(context.config.trials()))
    assert SECRET not in json.dumps(dict(trial_parameters(context, trial)))


def test_a_deleted_experiment_is_named(empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = MlflowClient(store_in(tmp_path))
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="experiment 'gone' was deleted"):
        connect(TrackingConfig(experiment="gone", tracking_uri=store_in(tmp_path)))


def test_a_project_run_in_another_store_is_explained(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="Set MLFLOW_TRACKING_URI to an absolute path"):
        connect(TrackingConfig(tracking_uri=store_in(tmp_path)))
