"""A whole study and its champion from Python, inside a program with settings of its own."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from html_page import Page
from tracked import Finished, store_in
from transformers.utils import logging as transformers_logging

import adaptive_lora as al
from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.config.store_place import ExperimentChoice, chosen_experiment
from adaptive_lora.errors import AdapterError, ConfigError, DataError, TrackingError
from adaptive_lora.runner.guest import unchanged_process
from adaptive_lora.runner.result import StudyResult
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.connection import unchanged_mlflow
from adaptive_lora.tracking.registry import adapter_folder

CHAMPION = "models:/adaptive-lora@champion"
ROW = {"instruction": "Swap 1", "input": "red blue"}


def process_state() -> dict[str, Any]:
    """Return the settings of this process that a study must leave alone."""
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values() if hasattr(each, "handlers"))]
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "loggers": {each.name: (each.level, list(each.handlers), each.disabled) for each in loggers},
        "warnings": list(warnings.filters),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "tracking": (mlflow.get_tracking_uri(), mlflow.get_registry_uri()),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002 - the stream that other libraries use
        "threads": torch.get_num_threads(),
        "precision": dict(AcceleratorState._shared_state),
        "excepthook": sys.excepthook,
        "folder": os.getcwd(),
    }


@pytest.fixture
def in_program(tmp_path: Path) -> Any:
    """A program with a tracking store and an accelerator of its own."""
    with unchanged_process(), unchanged_mlflow():
        mlflow.set_tracking_uri(store_in(tmp_path / "mine"))
        transformers_logging.enable_progress_bar()
        AcceleratorState._reset_state(reset_partial_state=True)
        yield Accelerator(mixed_precision="bf16", cpu=True)


def test_a_study_leaves_the_program_as_it_was(
    in_program: Any, in_store: Callable[..., StudyConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    before = process_state()
    result = al.study(in_store())
    after = process_state()
    assert {name: after["loggers"][name] for name in before["loggers"]} == before.pop("loggers")
    after.pop("loggers")
    assert after == before
    assert capfd.readouterr().out == ""
    assert result.trials_run == 1


def test_the_next_study_reads_no_store_of_the_one_before(in_store: Callable[..., StudyConfig]) -> None:
    connect(in_store().tracking).close()
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys()


@pytest.fixture(scope="module")
def result(finished: Finished) -> StudyResult:
    """The result of the finished study, whose call is repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.folder)
        return al.study(finished.config)


def test_the_result_says_who_won(result: StudyResult, finished: Finished, tmp_path: Path) -> None:
    assert result.trials_run == 0
    assert result.verdict == finished.outcome.study_result.comparison.headline
    assert [row["method"] for row in result.table] == ["uniform-r2", "empirical-r1"]
    written = finished.folder / result.report()
    again = result.report(tmp_path / "again")
    assert again == tmp_path / "again" / "report.html"
    rewritten, first = (re.sub(r"(?s)<svg/>|<svg .*?</svg>", "", path.read_text("utf-8")) for path in (again, written))
    assert rewritten == first  # but for its figures, which studies of the tests leave empty
    with pytest.raises(ConfigError, match=r"report.html cannot be a folder: it is a file; required a folder"):
        result.report(again)
    assert result.champion is not None
    assert result.to_dict()["champion"] == {"name": "adaptive-lora", "version": result.champion.version}
    page = Page(result._repr_html_()).root
    assert len(list(page.all("tr"))) == 3


def test_a_study_is_a_dictionary_a_file_or_a_configuration(tmp_path: Path) -> None:
    wrong = {"seeds": "0", "lr": "fast"}
    (tmp_path / "study.json").write_text(json.dumps(wrong), encoding="utf-8")
    (tmp_path / "study.yaml").write_text("seeds: 0\nlr: fast\n", encoding="utf-8")
    for given in (wrong, tmp_path / "study.json", str(tmp_path / "study.yaml")):
        with pytest.raises(ConfigError, match="lr: expected a number, got 'fast'"):
            al.study(given)
    for config in ({"data": "nowhere.json"}, StudyConfig()):
        with pytest.raises(DataError, match=r"nowhere\.json"):
            al.study(config, data="nowhere.json")
    with pytest.raises(ConfigError, match="unknown setting 'seed'; did you mean 'seeds'"):
        al.study({}, seed=1)
    with pytest.raises(ConfigError, match=r"study file nowhere\.yaml cannot be read"):
        al.study("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"required a study as a dictionary .* got list"):
        al.study(["uniform"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"console must be a rich.console.Console or None; got a bool"):
        al.study({"seeds": "0"}, console=True)  # type: ignore[arg-type]


def test_an_experiment_set_by_the_program_is_of_its_own_store(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = (TrackingConfig(tracking_uri=store_in(folder)) for folder in (finished.folder, tmp_path))
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    with unchanged_mlflow():
        mlflow.set_tracking_uri(own.tracking_uri)
        number = mlflow.set_experiment("adaptive-lora").experiment_id
        with unchanged_mlflow(other):
            assert chosen_experiment(other) == ExperimentChoice(name="adaptive-lora")
        with unchanged_mlflow(own):
            assert chosen_experiment(own).id == number
        assert os.environ["MLFLOW_EXPERIMENT_ID"] == number


def test_the_champion_answers(result: StudyResult, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    before = process_state()
    champion = al.load(CHAMPION)
    after = process_state()
    assert before.pop("loggers").items() <= after.pop("loggers").items()
    assert after == before
    (answer,) = champion.answer([ROW], max_new_tokens=4)
    with unchanged_mlflow():
        mlflow.set_tracking_uri(store_in(finished.folder))
        served = mlflow.pyfunc.load_model(CHAMPION)
    assert answer == served.predict([ROW], params={"max_new_tokens": 4})[0]
    assert not champion.model.training
    assert len(champion.tokenizer("red")["input_ids"]) == 3
    assert champion.record["task"]["name"] == "causal"
    assert repr(champion).startswith("<LoadedAdapter: causal on ")


def test_an_adapter_is_found_by_version_run_or_folder(
    result: StudyResult, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert result.champion is not None
    uri = store_in(finished.folder)
    with unchanged_mlflow():
        mlflow.set_tracking_uri(uri)
        folder = adapter_folder(result.champion.model_uri)
    champion = al.load(folder).answer([ROW], max_new_tokens=4)
    for address in (f"models:/adaptive-lora/{result.champion.version}", result.champion.model_uri):
        assert al.load(address, tracking_uri=uri).answer([ROW], max_new_tokens=4) == champion


def test_what_is_no_adapter_is_refused(result: StudyResult, finished: Finished, tmp_path: Path) -> None:
    uri = store_in(finished.folder)
    for given, words in (
        ("models:/nobody@champion", "nobody"),
        ("models:/adaptive-lora", "names no model|cannot be fetched|latest"),
        ("models:/../x@y", "names no model"),
    ):
        with pytest.raises(AdapterError, match=words):
            al.load(given, tracking_uri=uri)
    with pytest.raises(AdapterError, match=r"no adapter folder: required adaptive_lora\.json"):
        al.load(tmp_path)
    with pytest.raises(TrackingError):
        al.load(CHAMPION, tracking_uri=store_in(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="tracking_uri applies to models:/ and runs:/ addresses"):
        al.load(tmp_path, tracking_uri=uri)
    with pytest.raises(ConfigError, match="required the address or folder of an adapter; got int"):
        al.load(3)  # type: ignore[arg-type]
