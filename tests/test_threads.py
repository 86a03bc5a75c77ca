"""Threads on a shared machine: a bound on spinning, and a share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_lora.models import threads

SPINS = "import os, adaptive_lora; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "found"), [({}, threads.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")]
)
def test_spinning_is_bound_unless_the_user_chose(given: dict[str, str], found: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in threads._SPINNING}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **given}
    words = [sys.executable, "-c", SPINS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Four threads of torch's, nobody else on the machine, and no choice of the user's."""
    for name in threads._COUNT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads.tempfile, "gettempdir", lambda: str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def compute(inside: Any, over: Any) -> None:
    """Be another process that computes."""
    with threads.shared_cores():
        inside.set()
        over.wait(60)


def other() -> tuple[Any, Any]:
    """Start another process that computes; return it and what ends it."""
    context = multiprocessing.get_context("fork")
    inside, over = context.Event(), context.Event()
    process = context.Process(target=compute, args=(inside, over))
    process.start()
    assert inside.wait(60)
    return process, over


@pytest.mark.usefixtures("four_threads")
def test_processes_side_by_side_share_the_threads() -> None:
    with threads.shared_cores():
        assert torch.get_num_threads() == 4
    first, over = other()
    with threads.shared_cores():
        assert torch.get_num_threads() == 2
        with threads.shared_cores():  # trials that are trained together
            assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4
    second, _ = other()
    with threads.shared_cores():
        assert torch.get_num_threads() == 1
    over.set()
    first.join()
    os.kill(second.pid, signal.SIGKILL)
    second.join()
    with threads.shared_cores():
        assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_the_number_of_threads_is_the_users_where_they_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    process, over = other()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads.shared_cores():
        assert torch.get_num_threads() == 4
    over.set()
    process.join()
