"""Worker processes on GPUs and on a shared CPU: who sees which device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptive_lora as al
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import ConfigError
from adaptive_lora.runner.engines.processes import places_on_cpu, places_on_gpus


def test_a_worker_sees_one_of_the_gpus_that_the_command_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places_on_gpus("all", 2) == (
        [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}],
        ["worker on GPU 0", "worker on GPU 1"],
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5c0,GPU-9d1,GPU-e22")
    assert places_on_gpus("2,0", 3)[0] == [{"CUDA_VISIBLE_DEVICES": "GPU-e22"}, {"CUDA_VISIBLE_DEVICES": "GPU-5c0"}]


@pytest.mark.parametrize(("devices", "count", "words"), [
    ("all", 0, "has no GPU that torch can use"), ("0,3", 2, "numbers from 0 to 1"), ("1,1", 2, "different numbers"),
])  # fmt: skip
def test_gpus_that_there_are_not_are_refused(devices: str, count: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        places_on_gpus(devices, count)


def test_workers_share_the_threads() -> None:
    places, names = places_on_cpu(3, 8)
    assert [place["OMP_NUM_THREADS"] for place in places] == ["2", "2", "2"]
    assert len(set(names)) == 3
    assert places_on_cpu(4, 2)[0][0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_workers_on_all_gpus_give_the_losses_of_one_process(
    make_study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    def losses(name: str, **given: Any) -> list[float]:
        place = {"tracking_uri": f"sqlite:///{tmp_path / name}.db", "output": str(tmp_path / name)}
        result = al.study(make_study(precision="fp32", **place, **given))
        return [record.test.loss for record in sorted(result.records, key=lambda one: (one.method, one.seed))]

    assert losses("workers", devices="all") == pytest.approx(losses("serial"), rel=1e-4)
