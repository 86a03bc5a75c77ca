"""Worker processes and Ray workers that are lost: each trial once, and every number as the serial engine's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import rows, small_options
from engine_faults import LOOPBACK, SAVING, TRAINING, faults, log_of, ray_nodes, run, until
from test_kill import Place, check_same, place_in
from zygote import Zygote


@pytest.fixture(scope="module")
def options(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of the study of this module."""
    data = tmp_path_factory.mktemp("data") / "rows.json"
    data.write_text(json.dumps(rows(40)), encoding="utf-8")
    return small_options(base_folder, data)


@pytest.fixture(scope="module")
def reference(options: dict[str, object], zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The study by the serial engine."""
    place = place_in(tmp_path_factory.mktemp("serial") / "reference", options)
    run(zygote, place)
    return place


@pytest.fixture
def place(options: dict[str, object], tmp_path: Path) -> Place:
    return place_in(tmp_path / "study", options)


def test_worker_processes_that_are_killed(reference: Place, place: Place, zygote: Zygote) -> None:
    """One in a step, one between adapter and records; the study's own process is none of them."""
    environment, marks = faults(place.folder, (TRAINING, "kill"), (SAVING, "kill"))
    run(zygote, place, "--workers=2", environment=environment)
    assert all(mark.exists() for mark in marks)
    assert log_of(place).count("its process was ended by SIGKILL") == 2
    check_same(place, reference)


def test_ray_workers_that_are_killed_and_a_node_that_leaves(
    reference: Place, place: Place, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node leaves while its worker is between adapter and records; another one joins."""
    environment, (killed, waiting) = faults(place.folder, (TRAINING, "kill"), (SAVING, "wait"))
    with ray_nodes(monkeypatch) as nodes:
        for _ in range(2):
            nodes.add(environment)
        words = [*place.words, "--engine=ray", f"--ray-address={nodes.address}"]
        pid = zygote.start(words, place.folder, variables=LOOPBACK)
        until(waiting.exists, place)
        nodes.remove(nodes.node_of(int(waiting.read_text(encoding="utf-8"))))
        nodes.add()
        assert zygote.wait(pid) == 0, log_of(place)[-4000:]
    assert killed.exists()
    assert "its process ended" in log_of(place)
    assert "its node left the cluster" in log_of(place)
    check_same(place, reference)
