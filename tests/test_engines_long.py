"""Every fault that a study on worker processes or Ray survives, each with results equal to the serial engine's."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import save_llama
from engine_faults import (
    LOOPBACK,
    PATH,
    POINTS,
    SAVING,
    TRAINING,
    Nodes,
    family_of,
    faults,
    log_of,
    ray_nodes,
    run,
    until,
)
from peft_matrix import EVERY_START, spec_of
from servers import FaultyProxy, free_port, serving, tracking_words
from test_engines import options, place, reference
from test_kill import Place, check_same, histories, place_in, weights
from zygote import Zygote

__all__ = ["options", "place", "reference"]  # fixtures
pytestmark = pytest.mark.long
ENGINES = ("processes", "ray")


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def nodes(patch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    with ray_nodes(patch) as nodes:
        yield nodes


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Any:
    """Function that adds two nodes with an environment if the engine is Ray, and returns words and environment."""
    kind = request.param
    nodes = request.getfixturevalue("nodes") if kind == "ray" else None

    def prepare(environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        if nodes is None:
            return ["--workers=2"], environment
        for _ in range(2):
            nodes.add(environment)
        return ["--engine=ray", f"--ray-address={nodes.address}"], LOOPBACK

    return prepare


def survivors(pids: list[int]) -> list[int]:
    """Return the processes that are still there after a while."""
    left = [pid for pid in pids if psutil.pid_exists(pid)]
    end = time.monotonic() + 15
    while left and time.monotonic() < end:
        time.sleep(0.2)
        left = [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    return left


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("point", POINTS)
def test_a_worker_is_killed(engine: Any, point: str, reference: Place, place: Place, zygote: Zygote) -> None:
    environment, (mark,) = faults(place.folder, (POINTS[point], "kill"))
    words, own = engine(environment)
    run(zygote, place, *words, environment=own)
    assert mark.exists()
    check_same(place, reference)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_worker_hangs(engine: Any, reference: Place, place: Place, zygote: Zygote) -> None:
    """It is stopped in a step, as by a device that does not answer, and replaced after its silence."""
    environment, (mark,) = faults(place.folder, (TRAINING, "stop"))
    words, own = engine(environment)
    run(zygote, place, *words, "--worker-minutes=0.3", environment=own)
    assert "no sign of life for" in log_of(place)
    assert survivors([int(mark.read_text(encoding="utf-8"))]) == []
    check_same(place, reference)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_driver_ends_and_is_started_again(
    engine: Any, number: signal.Signals, reference: Place, place: Place, zygote: Zygote
) -> None:
    """Its workers end by themselves; those that are asked to write checkpoints first."""
    environment, (mark,) = faults(place.folder, (TRAINING, "wait" if number == signal.SIGKILL else "slow"))
    words, own = engine(environment)
    pid = zygote.start([*place.words, *words], place.folder, variables=own)
    until(mark.exists, place)
    family = [process.pid for process in family_of(pid)]
    os.kill(pid, number)
    assert zygote.wait(pid) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert survivors([int(mark.read_text(encoding="utf-8")), *family]) == []
    run(zygote, place, *words, environment=own)
    check_same(place, reference)


def test_a_node_leaves_and_another_joins(nodes: Nodes, reference: Place, place: Place, zygote: Zygote) -> None:
    """For a while there is no node at all."""
    environment, (mark,) = faults(place.folder, (SAVING, "wait"))
    node = nodes.add(environment)
    pid = zygote.start(
        [*place.words, "--engine=ray", f"--ray-address={nodes.address}"], place.folder, variables=LOOPBACK
    )
    until(mark.exists, place)
    nodes.remove(node)
    until(lambda: "its node left the cluster" in log_of(place), place)
    time.sleep(5)
    nodes.add()
    assert zygote.wait(pid) == 0, log_of(place)[-4000:]
    assert log_of(place).count("left the cluster") == 1
    check_same(place, reference)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_the_tracking_server_is_away_for_a_minute(
    engine: Any, options: dict[str, object], zygote: Zygote, tmp_path: Path
) -> None:
    """It goes away while a worker trains, which is killed then."""
    environment, (mark,) = faults(tmp_path, (TRAINING, "kill"))
    backend = f"sqlite:///{tmp_path / 'server.db'}"
    with serving(tracking_words(backend, tmp_path / "artifacts"), "/health", tmp_path) as address:
        proxy = FaultyProxy(int(address.rpartition(":")[2]))
        serial = place_in(tmp_path / "serial", options, proxy.address)
        run(zygote, serial)
        studied = place_in(tmp_path / "studied", options, proxy.address)
        words, own = engine(environment)
        pid = zygote.start([*studied.words, *words], studied.folder, variables=own)
        until(mark.exists, studied)
        proxy.down = True
        time.sleep(60)
        proxy.down = False
        assert zygote.wait(pid) == 0, log_of(studied)[-4000:]
        assert proxy.injected
        assert weights(studied) == weights(serial)
        assert histories(studied) == histories(serial)
        check_same(studied, serial)
        proxy.shutdown()


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_poisoned_trial_among_good_ones(
    engine: Any, options: dict[str, object], zygote: Zygote, tmp_path: Path
) -> None:
    poisoned = {**options, "lr": "1e-2 1e30"}
    places = [place_in(tmp_path / name, poisoned) for name in ("serial", "workers")]
    run(zygote, places[0])
    words, own = engine({})
    run(zygote, places[1], *words, environment=own)
    ended = [
        sorted((run.data.tags["method"], run.data.tags["seed"], run.data.tags["lr"], run.info.status,
                run.data.tags.get("failure", "")) for run in place.trials)
        for place in places
    ]  # fmt: skip
    assert ended[0] == ended[1]
    assert {status for *_, status, _ in ended[0]} == {"FINISHED", "FAILED"}
    histories_of = [
        {run.data.tags["trial_signature"]: [
            (key, m.step, m.value) for key in ("train/loss", "validation/loss")
            for m in sorted(place.client.get_metric_history(run.info.run_id, key), key=lambda m: m.step)]
         for run in place.trials}
        for place in places
    ]  # fmt: skip
    assert repr(sorted(histories_of[0].items())) == repr(sorted(histories_of[1].items()))  # NaN equals NaN in text


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_two_drivers_at_once(engine: Any, reference: Place, place: Place, zygote: Zygote) -> None:
    """The second is refused; with --wait it goes on, and finds nothing to do."""
    environment, (mark,) = faults(place.folder, (TRAINING, "hold"))
    words, own = engine(environment)
    first = zygote.start([*place.words, *words], place.folder, variables=own)
    until(mark.exists, place)
    second = subprocess.Popen(
        [sys.executable, "-m", "adaptive_lora.cli", *place.words, *words], cwd=place.folder, env={**os.environ, **own},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    waiting = subprocess.Popen(
        [sys.executable, "-m", "adaptive_lora.cli", *place.words, *words, "--wait", "--json"], cwd=place.folder,
        env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    _, said = second.communicate(timeout=300)
    assert second.returncode == 2
    assert "Wait for its end with --wait" in " ".join(said.split())
    mark.with_name(f"{mark.name}.go").touch()
    assert zygote.wait(first) == 0, log_of(place)[-4000:]
    document, _ = waiting.communicate(timeout=300)
    assert waiting.returncode == 0
    assert json.loads(document)["trials_run"] == 0
    check_same(place, reference)


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own for a node takes root")
@pytest.mark.parametrize("kibibytes", [48, 120])
def test_a_full_disk_on_one_node(kibibytes: int, nodes: Nodes, reference: Place, place: Place, zygote: Zygote) -> None:
    """One node writes into the study's folder on a disk that is soon full; the other takes its trials."""
    output = place.folder / "adaptive-lora-out"
    output.mkdir()
    nodes.add()
    with nodes.elsewhere(f"mount -t tmpfs -o size={kibibytes}k tmpfs {output}", others=2):
        pid = zygote.start(
            [*place.words, "--engine=ray", f"--ray-address={nodes.address}"], place.folder, variables=LOOPBACK
        )
        assert zygote.wait(pid) == 0, log_of(place)[-4000:]
        assert re.search(r"No space left on device.*; its machine is no longer used", log_of(place))
        check_same(place, reference)


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own for a node takes root")
def test_data_that_only_the_driver_has(
    nodes: Nodes, options: dict[str, object], place: Place, zygote: Zygote, base_folder: Path
) -> None:
    nodes_words = ["--engine=ray", f"--ray-address={nodes.address}"]
    with nodes.elsewhere(f"mount -t tmpfs tmpfs {Path(str(options['data'])).parent}"):
        assert zygote.wait(zygote.start([*place.words, *nodes_words], place.folder, variables=LOOPBACK)) == 2
        text = " ".join(log_of(place).split())
        assert f"{options['data']} exists where the study was started, not on" in text
        assert "Traceback" not in text


def test_a_node_with_other_versions(nodes: Nodes, place: Place, zygote: Zygote, tmp_path: Path) -> None:
    other = tmp_path / "packages" / "peft-0.0.1.dist-info" / "METADATA"
    other.parent.mkdir(parents=True)
    other.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n", encoding="utf-8")
    nodes.add({"PYTHONPATH": os.pathsep.join([str(other.parents[1]), PATH])})
    words = [*place.words, "--engine=ray", f"--ray-address={nodes.address}"]
    assert zygote.wait(zygote.start(words, place.folder, variables=LOOPBACK)) == 2
    text = " ".join(log_of(place).split())
    assert f"differ from those where the study was started: peft 0.0.1 (required {version('peft')})" in text
    assert "Traceback" not in text
    assert all(run.info.status != "FINISHED" for run in place.trials)


def test_a_cluster_of_another_ray(nodes: Nodes, place: Place, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.0.0'\n", encoding="utf-8")
    words = [*place.words, "--engine=ray", f"--ray-address={nodes.address}"]
    done = subprocess.run(
        [sys.executable, "-m", "adaptive_lora.cli", *words], cwd=place.folder, capture_output=True, text=True,
        env={**os.environ, **LOOPBACK, "PYTHONPATH": os.pathsep.join([str(tmp_path), PATH])}, check=False,
    )  # fmt: skip
    text = " ".join(done.stderr.split())
    assert done.returncode == 2, text
    assert "which runs other versions" in text
    assert all(f"Ray: {number}" in text for number in ("2.0.0", version("ray"))), text
    assert "Traceback" not in text


def test_a_cluster_without_the_gpus_that_are_asked_for(nodes: Nodes, place: Place, zygote: Zygote) -> None:
    nodes.add()
    words = [*place.words, "--engine=ray", f"--ray-address={nodes.address}", "--gpus-per-trial=1"]
    assert zygote.wait(zygote.start(words, place.folder, variables=LOOPBACK)) == 2
    text = " ".join(log_of(place).split())
    assert "required 1 CPU and 1 GPU (--cpus-per-trial, --gpus-per-trial); of 2 in it, the largest has 1 CPU" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("form", ["auto", "ray://"])
def test_a_cluster_that_runs_is_joined(
    form: str, reference: Place, place: Place, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that `ray start` has started, with a token."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:  # sockets take short paths
        own = {
            "RAY_TMPDIR": folder,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # other tests of this module set it to 0
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": PATH,
        }
        client = next(port for port in iter(free_port, None) if not 10_002 <= port < 20_000)
        words = (
            f"-m ray.scripts.scripts start --head --block --num-cpus=2 --port={free_port()} --include-dashboard=false"
        )
        head = subprocess.Popen(
            [sys.executable, *words.split(), f"--ray-client-server-port={client}"], env={**os.environ, **own}
        )
        try:
            until(lambda: Path(folder, "ray", "ray_current_cluster").exists() and is_served(client))
            address = f"ray://127.0.0.1:{client}" if form == "ray://" else form
            run(zygote, place, "--engine=ray", f"--ray-address={address}", environment=own)
        finally:
            for process in (*family_of(head.pid), head):
                process.kill()
            head.wait()
    check_same(place, reference)


def is_served(port: int) -> bool:
    """Return whether something listens on a port of this machine."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_groups_in_workers_have_the_numbers_of_the_engine_together(
    options: dict[str, object], zygote: Zygote, tmp_path: Path
) -> None:
    grid = {**options, "seeds": "0 1 2 3"}
    places = [place_in(tmp_path / name, grid) for name in ("together", "workers")]
    run(zygote, places[0], "--methods=uniform:rank=2", "--engine=together", "--group-size=2")
    run(zygote, places[1], "--methods=uniform:rank=2", "--workers=2", "--group-size=2")
    assert len(places[1].trials) == 4
    assert weights(places[1]) == weights(places[0])
    assert histories(places[1]) == histories(places[0])


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_starts_and_types_of_adapters(engine: Any, options: dict[str, object], zygote: Zygote, tmp_path: Path) -> None:
    methods = f"{EVERY_START} {spec_of('GRALORA')} {spec_of('MISS')},base=nf4"
    changes = {
        "model": save_llama(tmp_path / "wide", width=64), "methods": methods, "seeds": 0, "profile_batches": 2,
    }  # fmt: skip
    serial, several = (place_in(tmp_path / name, options, **changes) for name in ("serial", "several"))
    run(zygote, serial)
    words, environment = engine({})
    run(zygote, several, *words, environment=environment)
    check_same(several, serial, trials=len(serial.trials))
