"""Freed memory stays with the process."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from zygote import Zygote

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from adaptive_lora.models.malloc import keep_freed_memory
    assert keep_freed_memory()
def use():
    for _ in range(20):
        torch.ones(10_000_000)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_are_not_fetched_again(zygote: Zygote, tmp_path: Path) -> None:
    faults = {how: int(zygote.python(FAULTS, how, folder=tmp_path)) for how in ("usual", "kept")}
    assert faults["kept"] < faults["usual"] / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptive_lora.models.malloc import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


HELD = """
import psutil, sys, torch
from adaptive_lora.models.malloc import give_freed_memory_back, keep_freed_memory
keep_freed_memory()  # what an earlier study of the process asked for
if sys.argv[1] == "back":
    assert give_freed_memory_back()
before = psutil.Process().memory_info().rss
for _ in range(3):
    tensors = [torch.ones(1_000_000) for _ in range(50)]
    last = torch.ones(1)
    del tensors
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_under_a_limit_freed_memory_is_given_back(zygote: Zygote, tmp_path: Path) -> None:
    kept, back = (int(zygote.python(HELD, how, folder=tmp_path)) for how in ("kept", "back"))
    assert kept > 150_000_000
    assert back < 50_000_000


PEAK = """
import torch
from adaptive_lora.models.malloc import keep_freed_memory
from adaptive_lora.training.memory.peak import PeakMemory
keep_freed_memory()
for _ in range(2):  # what earlier trainings took, and left with the process
    torch.ones(100_000_000)
model, cpu = torch.nn.Linear(1000, 5000), torch.device("cpu")
for size in (20_000_000, 5_000_000):
    peak = PeakMemory(cpu, model)
    held = torch.ones(size)
    del held
    print(peak.bytes)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux counts a peak anew")
def test_a_trainings_peak_is_its_own(zygote: Zygote, tmp_path: Path) -> None:
    """Of 400 MB that an earlier one left, and of the interpreter, nothing is counted."""
    large, small = map(int, zygote.python(PEAK, folder=tmp_path).split())
    model = 4 * 1001 * 5000
    assert large == pytest.approx(model + 80_000_000, abs=8_000_000)
    assert small == pytest.approx(model + 20_000_000, abs=8_000_000)


def test_where_no_peak_is_told_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from adaptive_lora.training.memory import peak as memory

    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    assert memory.PeakMemory(torch.device("cpu"), torch.nn.Linear(2, 2)).bytes is None
