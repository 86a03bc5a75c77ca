"""One trial over several processes: two on a CPU, joined by gloo, against one."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import save_llama
from mlflow import MlflowClient
from peft_matrix import EVERY_START, spec_of
from task_studies import TASKS, study_of
from tracked import store_in
from zygote import Zygote

from adaptive_lora.cli import main
from adaptive_lora.tracking.runs import RACE, RESULT

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""Variables that `accelerate launch --use_fsdp --fsdp_version 2` sets."""


@dataclass(frozen=True)
class Launch:
    """Commands on a base and data, in one process or in several that torchrun or `accelerate launch` would start."""

    zygote: Zygote
    folder: Path
    words: tuple[str, ...]

    def start(self, *more: str, count: int = 1, fault: Mapping[int, tuple[Any, ...]] | None = None, **env: str) -> Any:
        """Start the command in `count` processes, some with a fault; return their numbers."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        cpu = {"CUDA_VISIBLE_DEVICES": "", **env}
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **cpu}
        return [
            self.zygote.start(
                [*self.words, *more],
                self.folder,
                fault=(fault or {}).get(index),
                variables={**shared, "RANK": str(index), "LOCAL_RANK": str(index)} if count > 1 else cpu,
                log=f"log{index}.txt",
            )
            for index in range(count)
        ]

    def run(self, *more: str, **how: Any) -> list[int]:
        """Run it to its end; return the exit codes."""
        return [self.zygote.wait(pid) for pid in self.start(*more, **how)]

    @property
    def said(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("log*.txt")))

    def statuses(self) -> dict[str, str]:
        """Return label -> status of every trial's run."""
        client = MlflowClient(store_in(self.folder))
        experiments = [one.experiment_id for one in client.search_experiments()]
        runs = [run for run in client.search_runs(experiments) if "method" in run.data.tags]
        return {str(run.info.run_name): f"{run.info.status} {run.data.tags.get(RACE, '')}" for run in runs}

    def results(self) -> dict[str, dict[str, Any]]:
        """Return label -> recorded result of the finished trials."""
        client = MlflowClient(store_in(self.folder))
        experiments = [one.experiment_id for one in client.search_experiments()]
        runs = [run for run in client.search_runs(experiments) if "method" in run.data.tags]
        assert len({run.info.run_name for run in runs}) == len(runs)  # each trial once
        found = {}
        for run in runs:
            assert run.info.status == "FINISHED"
            path = client.download_artifacts(run.info.run_id, RESULT, str(self.folder))
            result = json.loads(Path(path).read_text(encoding="utf-8"))
            found[str(run.info.run_name)] = {**result, "order": run.data.tags["order_digest"]}
        return found


Maker = Callable[..., Launch]


@pytest.fixture
def launch(zygote: Zygote, empty_store: Path, options: dict[str, object], tmp_path: Path) -> Maker:
    """Return a function that makes a study's command in a folder and a store of its own."""

    def make(name: str, command: str = "study", **changes: object) -> Launch:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
        given = {**options, "seeds": "0", "tracking_uri": store_in(folder), "output": str(folder / "out"), **changes}
        words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        return Launch(zygote, folder, (command, *words))

    return make


def differences(one: Launch, other: Launch) -> dict[str, float]:
    """Return the largest difference of a step's loss and of an example's test loss, in nats."""
    mine, others = one.results(), other.results()
    assert mine
    assert mine.keys() == others.keys()
    found: dict[str, float] = {}
    for label in mine:
        a, b = mine[label], others[label]
        assert a["order"] == b["order"]
        for part, first, second in (("train", a["losses"], b["losses"]), ("test", a["test"]["nll"], b["test"]["nll"])):
            found[part] = max(found.get(part, 0.0), float(np.abs(np.subtract(first, second)).max()))
    return found


def test_two_processes_compute_what_one_does(launch: Maker) -> None:
    changes = {
        "methods": "linear_decay:rank=3,low_rank=1 empirical:rank=2",
        "lr": "2e-3",
        "max_steps": 8,
        "epochs": 4,
        "base_dropout": False,  # whose masks are drawn for each process
        "batch_size": 29,  # of 30 examples: the second batch leaves a process without one
        "validations": 2,
    }
    one, ddp, fsdp = (launch(name, **changes) for name in ("one", "ddp", "fsdp"))
    assert one.run() == [0]
    assert ddp.run(count=2) == [0, 0], ddp.said
    assert fsdp.run(count=2, **FSDP) == [0, 0], fsdp.said
    for several in (ddp, fsdp):
        assert max(differences(one, several).values()) < 1e-5
        assert "reloaded and equal" in several.said
        assert (several.folder / "log1.txt").read_text(encoding="utf-8") == ""


@pytest.mark.gpu
@pytest.mark.parametrize("fsdp", [{}, FSDP, {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}], ids=["ddp", "fsdp", "offload"])
def test_two_gpus_compute_what_one_does(launch: Maker, fsdp: dict[str, str]) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    changes = {"methods": "linear_decay:rank=3,low_rank=1 empirical:rank=2", "lr": "2e-3", "base_dropout": False}
    one, two = (launch(name, **changes) for name in ("one", "two"))
    assert one.run(CUDA_VISIBLE_DEVICES="0") == [0]
    assert two.run(count=2, CUDA_VISIBLE_DEVICES="0,1", **fsdp) == [0, 0], two.said
    assert max(differences(one, two).values()) < 1e-4
    assert "reloaded and equal" in two.said


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ("study --engine ray", {}, "--engine ray runs trials beside each other"),
        ("study --devices all", {}, "--devices all runs trials beside each other"),
        ("study", {"ACCELERATE_USE_DEEPSPEED": "true"}, "the launcher asks for DeepSpeed"),
        ("study", {**FSDP, "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        (
            "study --methods peft:type=MISS",
            FSDP,
            "peft-MISS: reads or trains weights of the base itself, as PEFT's types",
        ),
        ("study --methods bitfit", FSDP, "bitfit: reads or trains weights of the base itself"),
        ("train --method uniform:rank=2,dora=true", FSDP, "uniform-r2-dora: reads or trains weights"),
        ("compare", {}, "compare runs in one process; 2 were launched"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: str, variables: dict[str, str], message: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert message in result.stderr


STEP = ("adaptive_lora.training.trainer", "Trainer.apply")
"""Function called once an optimiser step, for faults."""


@pytest.mark.long
@pytest.mark.parametrize("fsdp", [{}, FSDP], ids=["ddp", "fsdp"])
def test_a_checkpoint_continues_on_another_number_of_processes(launch: Maker, fsdp: dict[str, str]) -> None:
    changes = {"methods": "grow_prune:rank=2", "lr": "2e-3", "max_steps": 12, "epochs": 10, "base_dropout": False}
    whole, fewer, more = (launch(name, **changes) for name in ("whole", "fewer", "more"))
    assert whole.run() == [0]
    fault = (*STEP, 6, "after", signal.SIGINT)
    assert fewer.run(count=2, fault={1: fault}, **fsdp) == [130, 130]  # all stop where one of them is stopped
    assert more.run(fault={0: fault}) == [130]
    for interrupted in (fewer, more):
        assert list(interrupted.folder.rglob("training1-step000000006"))
    assert fewer.run() == [0]
    assert more.run(count=2, **fsdp) == [0, 0]
    for continued in (fewer, more):
        assert max(differences(whole, continued).values()) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_others(launch: Maker, lost: int) -> None:
    changes = {"methods": "uniform:rank=2", "lr": "2e-3", "checkpoint_steps": 1, "base_dropout": False}
    whole, killed = (launch(name, **changes) for name in ("whole", "killed"))
    assert whole.run() == [0]
    codes = killed.run(count=2, fault={lost: (*STEP, 2, "before", signal.SIGKILL)})
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 2
    assert "another of the processes that train this trial has ended" in killed.said
    assert killed.run(count=2) == [0, 0]
    assert max(differences(whole, killed).values()) < 1e-5


@pytest.mark.long
def test_a_race_and_failures_are_decided_alike(launch: Maker) -> None:
    changes = {"methods": "uniform:rank=2", "lr": "1e-3 1e-2 1e9", "max_steps": 8, "epochs": 10, "validations": 4}
    words = ("--race", "true", "--max-skipped-steps", "0")
    one, several = (launch(name, base_dropout=False, seeds="0 1", **changes) for name in ("one", "several"))
    assert one.run(*words) == [0]
    assert several.run(*words, count=2) == [0, 0], several.said
    assert several.statuses() == one.statuses()


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_task(launch: Maker, tmp_path: Path, task: str) -> None:
    changes = {**study_of(task, tmp_path / "task"), "lr": "2e-3", "batch_size": 5, "base_dropout": False}
    quantised = " uniform:rank=2,base=nf4" if task == "causal" else ""
    one, ddp, fsdp = (
        launch(name, **{**changes, "methods": f"uniform:rank=2{quantised}"}) for name in ("one", "ddp", "fsdp")
    )
    assert one.run() == [0]
    assert ddp.run(count=2) == [0, 0], ddp.said
    assert fsdp.run(count=2, **FSDP) == [0, 0], fsdp.said
    for several in (ddp, fsdp):
        assert max(differences(one, several).values()) < 2e-5
        assert "reloaded and equal" in several.said


@pytest.mark.long
def test_starts_and_types_of_adapters(launch: Maker, tmp_path: Path) -> None:
    """Every kind of initial weights and some of PEFT's types, on bases as saved and in 4 bit."""
    types = ("GRALORA", "VBLORA", "SHIRA", "DELORA")
    methods = [EVERY_START, *map(spec_of, types), f"{spec_of('MISS')},base=nf4", f"{spec_of('OFT')},base=nf4"]
    changes = {
        "model": save_llama(tmp_path / "wide", width=64), "methods": " ".join(methods), "lr": "2e-3", "max_steps": 6,
        "batch_size": 9, "profile_batches": 2,
    }  # fmt: skip
    one, ddp = (launch(name, **changes) for name in ("one", "ddp"))
    assert one.run() == [0], one.said
    assert ddp.run(count=2) == [0, 0], ddp.said
    assert max(differences(one, ddp).values()) < 1e-5
    assert "reloaded and equal" in ddp.said
