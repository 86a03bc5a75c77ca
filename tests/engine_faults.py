"""Studies on worker processes and local Ray clusters, and the faults that befall them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_kill import Place
from zygote import Zygote

TRAINING = ("adaptive_lora.training.trainer", "Trainer.apply", 3)
"""Function and call in the third step of a process's training; a checkpoint is written at the second."""
CHECKPOINT = ("adaptive_lora.training.checkpoint_files", "save_file", 2)
"""A checkpoint is half written."""
SAVING = ("adaptive_lora.runner.trial", "log_outcome", 1)
"""The adapter is saved, nothing of the outcome is logged."""
UPLOAD = ("adaptive_lora.tracking.uploader", "Uploader._upload", 2)
"""A part of the outcome is in the store."""
END = ("adaptive_lora.tracking.recorder", "Recorder.end", 1)
"""The outcome is logged, the run is not ended."""
POINTS = {"training": TRAINING, "checkpoint": CHECKPOINT, "saving": SAVING, "logging": UPLOAD, "end": END}
PATH = os.pathsep.join(path for path in sys.path if path)
"""Where this process imports from."""
PATIENCE = 120.0
"""Seconds after which something that does not happen is given up."""
STORE = 80 * 2**20
"""Bytes of a node's object store."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
"""Environment of clusters that listen on the loopback address alone."""


def faults(folder: Path, *points: tuple[tuple[str, str, int], str]) -> tuple[dict[str, str], list[Path]]:
    """Return the environment of processes that faults befall, each the first that comes to its point, and their marks.

    Args:
        folder: folder of the marks, one file for each fault that has happened.
        points: module, function and call; action as in `faulty/sitecustomize.py`.
    """
    marks = [folder / f"fault{number}" for number in range(len(points))]
    described = [
        {"module": module, "name": name, "call": call, "action": action, "mark": str(mark)}
        for ((module, name, call), action), mark in zip(points, marks, strict=True)
    ]
    path = os.pathsep.join([str(Path(__file__).parent / "faulty"), PATH])
    return {"FAULTS": json.dumps(described), "PYTHONPATH": path}, marks


def until(condition: Callable[[], Any], place: Place | None = None) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it did not happen" if place is None else log_of(place)[-4000:])
        time.sleep(0.05)


def log_of(place: Place) -> str:
    """Return what the commands in a place printed."""
    path = place.folder / "log.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""  # a command that has just been started


def run(zygote: Zygote, place: Place, *words: str, environment: dict[str, str] | None = None) -> None:
    """Run a study to its end."""
    code = zygote.wait(zygote.start([*place.words, *words], place.folder, variables=environment))
    assert code == 0, log_of(place)[-4000:]


def family_of(pid: int) -> list[psutil.Process]:
    """Return the processes that a process started, and theirs."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


START_ON_LOOPBACK = """
from ray._private import services
services.resolve_ip_for_localhost = lambda host: host  # the command takes no loopback address otherwise
from ray.scripts.scripts import main
main()
"""
"""Program of `ray start` for a node of a cluster on the loopback address."""


@dataclass(frozen=True)
class Nodes:
    """A Ray cluster on this machine, whose head has no room for workers."""

    cluster: Any

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, environment: dict[str, str] | None = None, cpus: int = 1) -> Any:
        """Add a node."""
        return self.cluster.add_node(
            wait=False,
            num_cpus=cpus,
            object_store_memory=STORE,
            node_ip_address="127.0.0.1",
            env_vars=environment or {},
        )

    def node_of(self, pid: int) -> Any:
        """Return the node that a worker process runs on."""
        parent = psutil.Process(pid).ppid()
        return next(
            node
            for node in self.cluster.worker_nodes
            if parent in [item.process.pid for item in node.all_processes["raylet"]]
        )

    def remove(self, node: Any) -> None:
        """End a node's processes at once."""
        self.cluster.remove_node(node, allow_graceful=False)

    @contextmanager
    def elsewhere(self, command: str, others: int = 1) -> Iterator[None]:
        """Run a node whose file systems are its own, changed by a command, beside so many others."""
        start = [
            sys.executable, "-c", START_ON_LOOPBACK, "start", "--block", "--num-cpus=1", f"--address={self.address}",
            "--node-ip-address=127.0.0.1", f"--object-store-memory={STORE}",
        ]  # fmt: skip
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f"{command} && exec {shlex.join(start)}"],
            env={**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
        )
        try:
            until(lambda: sum(node["Alive"] for node in self.cluster.global_state.node_table()) > others)
            yield
        finally:
            for one in (*family_of(process.pid), process):
                one.kill()
            process.wait()


@contextmanager
def ray_nodes(patch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Start a cluster that listens on the loopback address alone, and end it."""
    for name, value in {**LOOPBACK, "PYTHONPATH": PATH}.items():
        patch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 500,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 3,
        }
        head = {
            "num_cpus": 0,
            "node_ip_address": "127.0.0.1",
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_system_config": quick,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield Nodes(cluster)
        finally:
            cluster.shutdown()
