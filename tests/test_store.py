"""The tracking store: born whole, upgraded only when asked, found under any name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.store.db import utils as schema
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import make_url
from tracked import quiet, runs_in, store_in, trials_in, words_of
from zygote import arm

from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.config.store_place import sqlite_file, sqlite_uri, store_uri
from adaptive_lora.errors import ConfigError, TrackingError
from adaptive_lora.interruption import interruptible
from adaptive_lora.tracking import StudyRun, connect, study_run
from adaptive_lora.tracking import create as birth

BIRTH = "adaptive_lora.tracking.create"
MIGRATION = ("alembic.runtime.migration", "HeadMaintainer.update_to_step")
Fault = tuple[str, str, int, str, int]


def in_process(work: Callable[..., None], *words: Any) -> int:
    """Run a function in a new process; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work, args=words)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def begin(fault: Fault | None = None) -> None:
    """Begin a run in the default store of this folder, as a first command does."""
    if fault is not None:
        arm(*fault)
    with interruptible():
        store = connect(TrackingConfig())
        store.client.create_run(store.experiment_id)


def require_whole(folder: Path, runs: int) -> None:
    """Check that a folder holds a store with so many runs in one experiment, and nothing else."""
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]
    assert birth.state_of(store_in(folder)) is birth.State.WHOLE
    assert len(runs_in(folder)) == runs
    found = MlflowClient(store_in(folder)).search_experiments()
    assert {item.name for item in found} == {"Default", "adaptive-lora"}


@pytest.mark.parametrize(
    "fault",
    [
        (*MIGRATION, 1, "before", signal.SIGKILL),
        (*MIGRATION, 30, "after", signal.SIGKILL),
        (*MIGRATION, 45, "after", signal.SIGINT),
        (BIRTH, "SqlAlchemyStore._create_default_experiment", 1, "before", signal.SIGTERM),
        ("adaptive_lora.interruption", "_flush", 1, "before", signal.SIGKILL),
        (BIRTH, "_make", 1, "after", signal.SIGKILL),
    ],
    ids=["first-table", "between-tables", "ctrl-c", "no-experiment", "unnamed", "named"],
)
def test_a_first_command_that_is_ended_leaves_no_half_made_store(fault: Fault, tmp_path: Path) -> None:
    code = in_process(begin, fault)
    assert code == (-signal.SIGKILL if fault[-1] == signal.SIGKILL else 1)
    assert (tmp_path / "mlflow.db").exists() == (fault[1:4] == ("_make", 1, "after"))
    assert in_process(begin) == 0
    require_whole(tmp_path, runs=1)


def test_three_first_commands_at_once_make_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    require_whole(tmp_path, runs=3)


def make_earlier(file: Path, steps_before: int, *, used: bool) -> None:
    """Make a store as an earlier MLflow, or an interrupted one, leaves it."""
    engine = schema.create_sqlalchemy_engine(sqlite_uri(file))
    Base.metadata.create_all(engine)
    config = schema._get_alembic_config(sqlite_uri(file))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, birth._revisions()[steps_before])
    engine.dispose()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE _alembic_tmp_experiments (experiment_id INTEGER)")
        if used:
            row = "(experiment_id, name, artifact_location, lifecycle_stage)"
            database.execute(f"INSERT INTO experiments {row} VALUES (1, 'mine', 'there', 'active')")
            row = "(run_uuid, name, user_id, status, experiment_id, artifact_uri, lifecycle_stage,"
            row += " start_time, end_time)"
            values = "('r', 'run', 'me', 'FINISHED', 1, 'there', 'active', 1, 2)"
            database.execute(f"INSERT INTO runs {row} VALUES {values}")


def test_a_half_made_store_is_set_aside_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_earlier(tmp_path / "mlflow.db", 30, used=False)
    before = (tmp_path / "mlflow.db").read_bytes()
    connect(TrackingConfig())
    assert "half made by an interrupted command and holds no run" in caplog.text
    (aside,) = tmp_path.glob("mlflow.db.half-made-*")
    assert aside.read_bytes() == before
    assert aside.name in caplog.text
    assert birth.state_of(store_in(tmp_path)) is birth.State.WHOLE


def test_a_store_of_an_earlier_mlflow_is_upgraded_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    make_earlier(file, 3, used=True)
    before = file.read_bytes()
    with pytest.raises(TrackingError, match="`adaptive-lora upgrade-store` makes a backup"):
        connect(TrackingConfig())
    assert file.read_bytes() == before
    assert in_process(ended_upgrade, store_in(tmp_path)) == -signal.SIGKILL
    assert file.read_bytes() == before
    result = CliRunner().invoke(main, ["upgrade-store"])
    assert result.exit_code == 0, result.output
    (backup,) = tmp_path.glob("mlflow.db.backup-*")
    assert backup.read_bytes() == before
    assert str(backup) in result.output
    assert sorted(tmp_path.iterdir()) == [file, backup]
    assert [run.info.run_id for run in runs_in(tmp_path)] == ["r"]
    assert "needs no upgrade" in CliRunner().invoke(main, ["upgrade-store"]).output


def ended_upgrade(uri: str) -> None:
    """Be killed with the upgraded copy ready."""
    arm("adaptive_lora.interruption", "_flush", 1, "before")
    birth.upgrade(uri)


def test_a_store_in_use_is_not_upgraded(tmp_path: Path) -> None:
    make_earlier(tmp_path / "mlflow.db", 3, used=True)
    held = multiprocessing.get_context("fork").Event()
    done = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with (tmp_path / "mlflow.db").open("rb"):
            held.set()
            done.wait(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert held.wait(60)
    with pytest.raises(TrackingError, match=f"is open in process {process.pid}"):
        birth.upgrade(store_in(tmp_path))
    done.set()
    process.join()


def test_stores_of_others_are_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as database, database:
        database.execute("CREATE TABLE trials (number INTEGER)")
    with pytest.raises(TrackingError, match=r"another program's tables \(trials\)"):
        connect(TrackingConfig(tracking_uri="sqlite:///other.db"))
    connect(TrackingConfig(tracking_uri="sqlite:///newer.db"))
    with closing(sqlite3.connect(tmp_path / "newer.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(TrackingError, match="made by a later version of MLflow"):
        connect(TrackingConfig(tracking_uri="sqlite:///newer.db"))


@pytest.mark.parametrize("name", ["100%20", "a b", "it's", 'a "b"', "C#", "a?b=c", "a:b", "étude"])
def test_a_uri_leads_to_the_file_that_it_names(name: str, tmp_path: Path) -> None:
    """Relative, pasted into a URI as it is, and as the URI that comes out."""
    folder = tmp_path / name
    folder.mkdir()
    os.chdir(folder)
    uri = store_uri(TrackingConfig())
    assert sqlite_file(uri) == folder / "mlflow.db"
    for given in (f"sqlite:///{folder}/mlflow.db", uri):
        assert store_uri(TrackingConfig(tracking_uri=given)) == uri
    opened = make_url(uri)
    assert opened.database == str(folder / "mlflow.db")
    assert not opened.query


def test_an_encoded_uri_is_decoded_where_the_place_is_there(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    given = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/a%20b/mlflow.db")
    assert sqlite_file(store_uri(given)) == tmp_path / "a b" / "mlflow.db"
    query = TrackingConfig(tracking_uri="sqlite:///mlflow.db?timeout=9")
    assert store_uri(query) == f"sqlite:///{tmp_path}/mlflow.db?timeout=9"


@pytest.mark.parametrize("name", ["100%20", 'it\'s "a" b:c #1?x=y étude'])
def test_a_study_in_a_folder_with_an_odd_name(
    name: str, make_study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    """From the first trial to the proven champion, and not a file beside the folder."""
    before = sorted(path.name for path in tmp_path.iterdir())
    folder = tmp_path / name
    folder.mkdir()
    os.chdir(folder)
    config = make_study(methods="uniform:rank=2", max_steps=2, seeds="0 1", output=f"out {name}")
    outcome, shown = quiet(config)
    assert outcome.study_result.champion is not None, shown
    assert outcome.study_result.report().is_relative_to(Path(f"out {name}"))
    again, _ = quiet(config)
    assert again.trials_run == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, name])
    assert (folder / "mlruns").is_dir()


def test_mlflows_variables_are_followed_below_the_option(own_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**settings: Any) -> str:
        return connect(TrackingConfig(tracking_uri=own_store, **settings)).experiment

    assert chosen() == "'adaptive-lora'"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team-x")
    assert chosen() == "'team-x' (MLFLOW_EXPERIMENT_NAME)"
    assert chosen(experiment="mine") == "'mine'"
    number = MlflowClient(own_store).get_experiment_by_name("team-x").experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    assert chosen() == "'team-x' (MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID)"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with pytest.raises(TrackingError, match="which is not that experiment's; set one"):
        chosen()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert chosen() == "'team-x' (MLFLOW_EXPERIMENT_ID)"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    with pytest.raises(TrackingError, match="no experiment with the id 77"):
        chosen()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "a\nb")
    with pytest.raises(ConfigError, match="MLFLOW_EXPERIMENT_NAME must be 1 to 500 characters"):
        chosen()


def test_a_trial_goes_to_the_experiment_and_name_of_the_environment(
    options: dict[str, object], own_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team-x")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "tuesday")
    single = {key: value for key, value in options.items() if key not in ("methods", "seeds")}
    words = words_of({**single, "tracking_uri": own_store, "method": "uniform:rank=2"})
    result = CliRunner().invoke(main, ["train", *words])
    assert result.exit_code == 0, result.output
    assert "experiment 'team-x' (MLFLOW_EXPERIMENT_NAME)" in result.output
    (trial,) = trials_in(tmp_path)
    assert trial.info.run_name == "tuesday"
    experiment = MlflowClient(own_store).get_experiment(trial.info.experiment_id)
    assert experiment.name == "team-x"


def test_a_trial_is_asked_for_by_its_signature(own_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its runs are not known, none but its own is fetched among many trials."""
    store = connect(TrackingConfig(tracking_uri=own_store))
    study = StudyRun.open(store, study_id="s-1", name="s")
    tags = {"method": "m", "seed": "0", "fold": "0", "lr": "1"}
    for number in range(3):
        run = study.begin_trial("trial", {**tags, "trial_signature": f"s{number}"}, earlier=())
        run.flush(60)
        run.leave()
    fetched: list[int] = []
    whole = study_run.search

    def search(*words: Any) -> Any:
        found = whole(*words)
        fetched.append(len(found))
        return found

    monkeypatch.setattr(study_run, "search", search)
    study.begin_trial("trial", {**tags, "trial_signature": "s1"})
    assert fetched == [1]
