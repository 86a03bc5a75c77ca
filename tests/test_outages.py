"""Tracking outages: a real server behind a proxy that spoils requests; nothing lost or doubled."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from servers import Fault, FaultyProxy, MlflowProcess, SmallDisk, tracking_words
from tracked import quiet

from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.errors import Undelivered
from adaptive_lora.runner import trial as study_trial
from adaptive_lora.tracking import DataId, Recorder, connect, connection
from adaptive_lora.tracking import outbox as outbox
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder


@dataclass(frozen=True, kw_only=True)
class Site:
    """A tracking server, the proxy before it, and its disk."""

    server: MlflowProcess
    proxy: FaultyProxy
    disk: SmallDisk

    @property
    def client(self) -> MlflowClient:
        """A client that goes around the proxy."""
        return MlflowClient(self.server.address, self.server.address)

    def arrival(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """Return a metric's (step, value) in the order in which they came into the database."""
        query = "select step, value from metrics where run_uuid = ? and key = ? order by rowid"
        with closing(sqlite3.connect(self.disk.folder / "mlflow.db")) as database:
            return list(database.execute(query, (run_id, name)))

    def only_run(self, name: str) -> Any:
        """Return the one run of a name."""
        experiments = [item.experiment_id for item in self.client.search_experiments()]
        (run,) = self.client.search_runs(experiments, f"attributes.run_name = '{name}'")
        return run


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Site]:
    """A server on a small disk of its own, behind a proxy without faults."""
    disk = SmallDisk(tmp_path_factory.mktemp("site") / "disk", 24)
    (disk.folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    words = tracking_words("sqlite:///mlflow.db", disk.folder / "artifacts")
    server = MlflowProcess(words, "/health", disk.folder)
    proxy = FaultyProxy(server.port)
    yield Site(server=server, proxy=proxy, disk=disk)
    proxy.shutdown()
    proxy.server_close()
    server.stop()
    disk.remove()


STEPS = 240


def loss(number: int, step: int) -> float:
    """Return the value that run `number` records at a step."""
    return (number + 1) / (step + 1)


def record(run: Recorder, number: int, adapter: Path, steps: int) -> None:
    """Record what a trial records."""
    run.params({f"cfg.option{index}": index for index in range(120)})
    run.data("rows.json", f"digest{number}", "rows.json", 40)
    for step in range(steps):
        run.metric("train/loss", loss(number, step), step)
        run.metric("train/tokens", 100.0 * step, step)
        if step % 20 == 0:
            run.tags({"last": str(step)})
    run.model(adapter, {"method": "uniform"}, name="uniform", params={"seed": number})
    run.metric("test/loss", loss(number, steps), of_model=True, data=DataId("rows.json", f"digest{number}"))
    run.text("notes/plan.json", "{}" * 1000)
    run.tags({"last": "end"})
    run.end("FAILED" if number == 1 else "FINISHED")


def check(site: Site, number: int, adapter: Path, steps: int) -> int:
    """Check that a run arrived whole, once and in order; return how many points were found."""
    run = site.only_run(f"run {number}")
    run_id = run.info.run_id
    expected = [(step, loss(number, step)) for step in range(steps)]
    assert site.arrival(run_id, "train/loss") == expected
    assert site.arrival(run_id, "train/tokens") == [(s, 100.0 * s) for s in range(steps)]
    assert run.info.status == ("FAILED" if number == 1 else "FINISHED")
    assert run.data.tags["last"] == "end"
    assert len(run.data.params) == 120
    assert [one.dataset.digest for one in run.inputs.dataset_inputs] == [f"digest{number}"]
    query = f"source_run_id = '{run_id}'"
    (model,) = site.client.search_logged_models([run.info.experiment_id], query)
    assert (model.name, model.params, model.status) == ("uniform", {"seed": str(number)}, "READY")
    (scored,) = model.metrics
    assert (scored.key, scored.value) == ("test/loss", loss(number, steps))
    assert (scored.dataset_name, scored.dataset_digest) == ("rows.json", f"digest{number}")
    assert site.arrival(run_id, "test/loss") == [(0, loss(number, steps))]
    assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
    assert run.data.tags[MODEL_TAG] == f"models:/{model.model_id}"
    kept = adapter_folder(run.data.tags[MODEL_TAG])
    for path in adapter.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes()
    text = Path(site.client.download_artifacts(run_id, "notes/plan.json")).read_text()
    assert text == "{}" * 1000
    return 2 * steps


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with what an adapter's has: a record, a small file and a large one."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adaptive_lora.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 2048)
    return folder


def misfortunes(site: Site, rounds: int, pause: float) -> None:
    """Kill the server, fill its disk, and take it away, one after the other, for seconds each."""
    for _ in range(rounds):
        time.sleep(pause)
        site.server.stop(signal.SIGKILL)  # in the middle of what it was doing
        time.sleep(pause)
        site.server.start()
        time.sleep(pause)
        site.disk.fill()
        time.sleep(pause)
        site.disk.free()
        time.sleep(pause)
        site.proxy.down = True
        time.sleep(pause)
        site.proxy.down = False


def survive(site: Site, folder: Path, adapter: Path, *, runs: int, rounds: int, slowness: float) -> int:
    """Record runs while everything goes wrong; return how many points the server has."""
    site.proxy.share, site.proxy.slowness = 0.3, slowness
    home = connect(TrackingConfig(tracking_uri=site.proxy.address, output=str(folder / "out")))
    with ThreadPoolExecutor(1) as fate:
        done = fate.submit(misfortunes, site, rounds, slowness)
        for number in range(runs):
            record(Recorder.begin(home, f"run {number}", {}), number, adapter, STEPS)
            time.sleep(slowness)
        done.result()
    home.settle()
    home.close()
    site.proxy.share = 0.0
    assert not (folder / "out" / "spool").exists()
    return sum(check(site, number, adapter, STEPS) for number in range(runs))


def test_what_is_recorded_arrives_once_and_in_order_through_every_fault(
    site: Site, tmp_path: Path, adapter: Path
) -> None:
    found = survive(site, tmp_path, adapter, runs=4, rounds=1, slowness=0.5)
    assert found == 4 * 2 * STEPS
    assert set(site.proxy.injected) == set(Fault)


def test_a_study_trains_on_without_its_server_and_is_compared_after_a_sync(
    site: Site,
    tmp_path: Path,
    make_study: Callable[..., StudyConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_study(tracking_uri=site.proxy.address, output=str(tmp_path / "out"), experiment="outage")
    trained = []
    real = study_trial.run_trial

    def run_trial(context: Any, trial: Any, *rest: Any, **more: Any) -> Any:
        if len(trained) == 1:
            site.proxy.down = True
        trained.append(trial.label)
        return real(context, trial, *rest, **more)

    monkeypatch.setattr(study_trial, "run_trial", run_trial)
    monkeypatch.setattr(connection, "PATIENCE", 2.0)
    monkeypatch.setattr(outbox, "_WORTH_SAYING", 1)
    with pytest.raises(Undelivered, match="trained, not compared: then run the same command again"):
        quiet(config)
    assert len(trained) == 4
    assert "Training continues" in caplog.text

    site.proxy.down = False
    result = CliRunner().invoke(main, ["sync", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    *_, last = result.output.splitlines()
    sent, found = [int(w) for w in last.replace(",", "").split() if w.isdigit()][-2:]
    assert sent == found > 3 * 2 * 3  # at least three trials' losses and tokens

    outcome, _ = quiet(config)
    assert outcome.trials_run == 0
    assert len(trained) == 4
    assert outcome.study_result.champion is not None
    runs = site.client.search_runs([outcome.store.experiment_id])
    trials = [run for run in runs if "trial_signature" in run.data.tags]
    assert sorted(run.info.run_name for run in trials) == sorted(trained)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in trials:
        losses = outcome.store.read_json(run.info.run_id, "trial.json")["losses"]
        recorded = [value for _, value in site.arrival(run.info.run_id, "train/loss")]
        assert recorded == losses


def test_a_server_without_logged_models_has_the_adapters_with_their_runs(
    site: Site,
    make_study: Callable[..., StudyConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """MLflow 2.22.5 answers 404 where logged models are asked for, and knows everything else."""
    monkeypatch.setattr(site.proxy, "lacks", "/logged-models")
    own = {"experiment": "old", "registered_model": "old", "max_steps": 1, "seeds": "0"}
    outcome, shown = quiet(make_study(tracking_uri=site.proxy.address, methods="uniform:rank=2", **own))
    assert caplog.text.count("The tracking server is older than MLflow 3: logged models are left out") == 1
    assert outcome.study_result.champion is not None, shown
    (run,) = site.client.search_runs([outcome.store.experiment_id], "tags.`adaptive_lora.kind` = 'trial'")
    assert run.data.tags[MODEL_TAG] == f"runs:/{run.info.run_id}/adapter"
    assert run.outputs.model_outputs == []
    assert "test/loss" in run.data.metrics
    version = site.client.get_model_version_by_alias("old", "champion")
    assert (version.run_id, version.source) == (run.info.run_id, f"{run.info.artifact_uri}/adapter")
    assert (adapter_folder("models:/old@champion") / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_many_runs_arrive_through_minutes_of_faults(
    site: Site, tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, rounds = 24, 6
    found = survive(site, tmp_path, adapter, runs=runs, rounds=rounds, slowness=2.0)
    assert found == runs * 2 * STEPS
    with capsys.disabled():
        faults = ", ".join(f"{kind.value}: {site.proxy.injected[kind]}" for kind in Fault)
        print(f"\n{site.proxy.requests} requests, faults {site.proxy.injected.total()} ({faults})")
        print(f"killed, full and away {rounds} times each, for 2 s or as long as a start takes")
        print(f"metrics sent {runs * 2 * STEPS}, found {found}")
