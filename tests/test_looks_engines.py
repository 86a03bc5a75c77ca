"""Studies until they are decided on every engine: interrupted in the middle of a look, and two commands at once."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from conftest import rows, small_options
from engine_faults import LOOPBACK, log_of, ray_nodes, run
from test_kill import Place, numbers, place_in
from zygote import Zygote

STUDY = {
    "methods": "uniform:rank=2 uniform:rank=2,alpha=9 head_only", "seeds": "0 1 2 3 4 5", "lr": "1e-3 1e-2",
    "race": "true", "until": "decided", "max_seeds": 8, "margin": 0.1,
}  # fmt: skip
ADDED = 4
"""Trials of the second look: two seeds of the baseline and of the arm that is open."""


@pytest.fixture(scope="module")
def options(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of the study of this module."""
    data = tmp_path_factory.mktemp("data") / "rows.json"
    data.write_text(json.dumps(rows(40)), encoding="utf-8")
    return {**small_options(base_folder, data), **STUDY}


@pytest.fixture(scope="module")
def reference(options: dict[str, object], zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The study by the serial engine, without interruption."""
    place = place_in(tmp_path_factory.mktemp("serial") / "reference", options, methods=STUDY["methods"])
    run(zygote, place)
    return place


@pytest.fixture
def place(options: dict[str, object], tmp_path: Path) -> Place:
    return place_in(tmp_path / "study", options, methods=STUDY["methods"])


def ends(place: Place) -> Counter[tuple[str, str, str, str]]:
    """Return how often a trial ended in which way; no trial runs twice."""
    tags = ("method", "seed", "lr")
    return Counter((*(run.data.tags[tag] for tag in tags), run.info.status) for run in place.trials)


def check_same(place: Place, reference: Place) -> None:
    assert numbers(place) == numbers(reference)
    assert ends(place) == ends(reference)


def interrupted(
    number: signal.Signals,
    reference: Place,
    place: Place,
    zygote: Zygote,
    *words: str,
    variables: dict[str, str] | None = None,
) -> None:
    """Run a study that gets a signal when one of the trials of its second look has ended, and run it again."""
    first = sum(status == "FINISHED" for *_, status in ends(reference)) - ADDED
    fault = ("adaptive_lora.runner.progress", "StudyProgress.end", first + 1, "after", number)
    pid = zygote.start([*place.words, *words], place.folder, fault, variables=variables)
    assert zygote.wait(pid) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], log_of(place)[-4000:]
    assert "look   6 seeds of at most 8" in log_of(place)
    assert "look   8 seeds of at most 8" not in log_of(place)
    run(zygote, place, *words, environment=variables)
    check_same(place, reference)


def test_a_decided_arm_gets_no_further_trial(reference: Place) -> None:
    log = log_of(reference)
    assert "looks     at 6, 8 seeds; a difference can be shown at 8 or more (2 comparisons), equivalence at 6" in log
    assert "look   6 seeds of at most 8: uniform-r2-alpha9 equivalent, head_only open" in log
    assert "race   " in log
    later = [key for key in ends(reference) if int(key[1]) > 5]
    assert sorted((method, seed) for method, seed, *_ in later) == [
        (method, seed) for method in ("head_only", "uniform-r2") for seed in ("6", "7")
    ]
    looks = numbers(reference)["looks"]
    assert [[one["method"] for one in look["methods"]] for look in looks] == [
        ["uniform-r2-alpha9", "head_only"], ["head_only"]
    ]  # fmt: skip


def test_a_killed_study_ends_as_if_it_had_not_been(reference: Place, place: Place, zygote: Zygote) -> None:
    interrupted(signal.SIGKILL, reference, place, zygote)


@pytest.mark.long
def test_workers_whose_study_is_ended(reference: Place, place: Place, zygote: Zygote) -> None:
    interrupted(signal.SIGTERM, reference, place, zygote, "--workers=2")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("words", [(), ("--workers=2",)])
def test_any_interruption(
    words: tuple[str, ...], number: signal.Signals, reference: Place, place: Place, zygote: Zygote
) -> None:
    interrupted(number, reference, place, zygote, *words)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ray(
    number: signal.Signals, reference: Place, place: Place, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_nodes(monkeypatch) as nodes:
        for _ in range(2):
            nodes.add()
        words = ("--engine=ray", f"--ray-address={nodes.address}")
        interrupted(number, reference, place, zygote, *words, variables=LOOPBACK)


@pytest.mark.long
def test_two_commands_at_once(reference: Place, place: Place, zygote: Zygote) -> None:
    """The one that comes second waits, and finds nothing left to do."""
    pids = [zygote.start([*place.words, "--wait=true"], place.folder, log=f"log{number}.txt") for number in range(2)]
    assert [zygote.wait(pid) for pid in pids] == [0, 0]
    check_same(place, reference)
