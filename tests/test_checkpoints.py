"""Checkpoints: written whole, verified, and a trial that goes on is the one that never stopped."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.interruption import Interrupted, interruptible
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import TrialOutcome, run_trial
from adaptive_lora.training import Frequency, StepEvent, TrialCheckpoints
from adaptive_lora.training.checkpoint_files import CorruptCheckpoint, read_checkpoint, write_checkpoint

BaseContext = Callable[..., StudyContext]
EVERY_STEP = Frequency(minutes=1e9, steps=1)
NEVER = Frequency(minutes=1e9)

SETTINGS = {
    "seeds": "0", "epochs": 9, "max_steps": 8, "dropout": 0.1, "validations": 4,
    "accumulation": 2, "batch_size": 2,
}  # fmt: skip


@contextmanager
def signal_at_forward(context: StudyContext, number: int, kind: signal.Signals) -> Iterator[None]:
    """Send a real signal to this process within the n-th forward pass of training."""
    calls = {"count": 0}

    def hook(module: torch.nn.Module, *_: object) -> None:
        if module.training:
            calls["count"] += 1
            if calls["count"] == number:
                signal.raise_signal(kind)

    handle = context.base.model.get_submodule("transformer.ln_f").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def numbers(outcome: TrialOutcome) -> dict[str, Any]:
    """Return everything that must be the same, to the last bit."""
    train = dataclasses.replace(outcome.train, seconds=0.0, peak_memory_bytes=0)
    return {
        "train": train,
        "test": outcome.test.nll_E.tolist(),
        "plan": outcome.plan.to_dict(),
        "history": outcome.history,
        "adapter": [path.read_bytes() for path in sorted(outcome.folder.glob("*.safetensors"))],
    }


@pytest.mark.parametrize(
    ("method", "forward"),
    [
        pytest.param("uniform:rank=2", 4, marks=pytest.mark.long),
        ("uniform:rank=2", 9),
        ("adalora:rank=2", 7),
        pytest.param("adalora:rank=2", 13, marks=pytest.mark.long),
        ("grow_prune:rank=2,interval=2,move_share=0.3", 11),
        ("truncate:rank=2", 10),
        pytest.param("truncate_retrain:rank=2", 6, marks=pytest.mark.long),
        ("truncate_retrain:rank=2", 27),
        ("eva:rank=2", 8),
        ("gora:rank=2", 8),
        ("uniform:rank=2,init=pissa", 9),
        ("uniform:rank=2,init=lora_ga,alora=###", 9),
        ("linear_decay:rank=3,low_rank=1,init=corda,lora_fa=true", 8),
        ("houlsby:width=2", 7),
        ("full", 9),
        pytest.param("prompt_tuning:tokens=2", 4, marks=pytest.mark.long),
        ("p_tuning:tokens=2,encoder_width=3", 11),
    ],
)
def test_a_stopped_trial_goes_on_bit_for_bit(
    make_bench: BaseContext, tmp_path: Path, method: str, forward: int
) -> None:
    """Also where the signal comes in the middle of a step, and in a second training."""
    context = make_bench(methods=method, **SETTINGS)
    (trial,) = context.config.trials()
    whole_events: list[StepEvent] = []
    expected = numbers(run_trial(context, trial, tmp_path / "whole", whole_events.append))
    kept = tmp_path / "kept"
    kind = signal.SIGTERM if forward % 2 else signal.SIGINT
    with signal_at_forward(context, forward, kind), interruptible(), pytest.raises(Interrupted) as stopped:
        run_trial(context, trial, tmp_path / "cut", checkpoints=TrialCheckpoints(kept, NEVER))
    assert stopped.value.exit_code == (143 if forward % 2 else 130)
    context = make_bench(methods=method, **SETTINGS)  # as in another process
    events: list[StepEvent] = []
    again = TrialCheckpoints(kept, NEVER)
    outcome = run_trial(context, trial, tmp_path / "again", events.append, again)
    assert numbers(outcome) == expected
    assert events == whole_events  # told once more, and none twice
    assert again.seconds_before > 0
    again.remove()
    assert not kept.exists()


def with_scaler(context: StudyContext) -> torch.amp.GradScaler:
    """Give a CPU what float16 on a GPU has: autocast, and a scaler that overflows at first."""
    accelerator = context.runtime.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    return accelerator.scaler


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # accelerate overrides it
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first overflows
@pytest.mark.parametrize("forward", [3, 10])
def test_a_gradient_scaler_goes_on_where_it_was(make_bench: BaseContext, tmp_path: Path, forward: int) -> None:
    settings = {**SETTINGS, "max_skipped_steps": 8}
    context = make_bench(methods="uniform:rank=2", **settings)
    (trial,) = context.config.trials()
    scaler = with_scaler(context)
    expected, scale = numbers(run_trial(context, trial, tmp_path / "whole")), scaler.get_scale()
    assert 0 < expected["train"].skipped_steps < 8  # it fell, and it rose again
    kept = tmp_path / "kept"
    with_scaler(context)
    with signal_at_forward(context, forward, signal.SIGTERM), interruptible(), pytest.raises(Interrupted):
        run_trial(context, trial, tmp_path / "cut", checkpoints=TrialCheckpoints(kept, NEVER))
    scaler = with_scaler(context)
    found = numbers(run_trial(context, trial, tmp_path / "again", checkpoints=TrialCheckpoints(kept, NEVER)))
    assert scaler.get_scale() == scale != 2.0**20
    assert repr(found.pop("train")) == repr(expected.pop("train"))  # NaN differs from itself
    assert found == expected


def test_a_finished_training_is_not_repeated(make_bench: BaseContext, tmp_path: Path) -> None:
    """Where the process ends in the test after training, the adapter is there without a step."""
    context = make_bench(methods="uniform:rank=2", patience=2, **SETTINGS)
    (trial,) = context.config.trials()
    kept = TrialCheckpoints(tmp_path / "kept", NEVER)
    expected = numbers(run_trial(context, trial, tmp_path / "one", checkpoints=kept))
    with signal_at_forward(context, 1, signal.SIGTERM):  # a training step would end this test
        again = TrialCheckpoints(tmp_path / "kept", NEVER)
        assert numbers(run_trial(context, trial, tmp_path / "two", checkpoints=again)) == expected


def test_the_last_two_are_kept_and_a_damaged_one_falls_back(
    make_bench: BaseContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_bench(methods="uniform:rank=2", **SETTINGS)
    (trial,) = context.config.trials()
    expected = numbers(run_trial(context, trial, tmp_path / "whole"))
    kept = tmp_path / "kept"
    with signal_at_forward(context, 12, signal.SIGTERM), interruptible(), pytest.raises(Interrupted):
        run_trial(context, trial, tmp_path / "a", checkpoints=TrialCheckpoints(kept, EVERY_STEP))
    names = sorted(path.name for path in kept.iterdir())
    assert names == ["training1-step000000004", "training1-step000000005"]
    damaged = kept / names[1] / "tensors.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # one bit
    damaged.write_bytes(content)
    (kept / "training1-step000000009.partial-1").mkdir()  # a process died while it wrote
    first: list[StepEvent] = []
    with caplog.at_level(logging.WARNING):
        outcome = run_trial(context, trial, tmp_path / "b", first.append, TrialCheckpoints(kept, NEVER))
    assert "is corrupt and ignored" in caplog.text
    assert names[1] in caplog.text
    assert numbers(outcome) == expected
    assert not list(kept.glob("*partial*"))


def test_checkpoints_of_other_ranks_are_left_out(
    make_bench: BaseContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_bench(methods="uniform:rank=2 uniform:rank=3", **SETTINGS)
    two, three = context.config.trials()
    expected = numbers(run_trial(context, three, tmp_path / "whole"))
    kept = tmp_path / "kept"
    run_trial(context, two, tmp_path / "two", checkpoints=TrialCheckpoints(kept, NEVER))
    with caplog.at_level(logging.WARNING):
        outcome = run_trial(context, three, tmp_path / "three", checkpoints=TrialCheckpoints(kept, NEVER))
    assert "has other ranks" in caplog.text
    assert numbers(outcome) == expected


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(values=st.dictionaries(st.text(), plain, max_size=4))
def test_plain_values_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("checkpoint") / "one"
    write_checkpoint(folder, values)
    assert repr(read_checkpoint(folder)) == repr(values)  # NaN differs from itself


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    odd = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    values = {
        "odd": odd, "empty": torch.zeros(0, 4), "flag": torch.tensor(True),
        "half": odd.bfloat16(), "same": [odd, odd], "nan": torch.tensor(math.nan),
    }  # fmt: skip
    write_checkpoint(tmp_path / "one", values)
    found = read_checkpoint(tmp_path / "one")
    assert found["odd"].equal(odd)
    assert found["empty"].shape == (0, 4)
    assert found["half"].dtype == torch.bfloat16
    assert all(tensor.equal(odd) for tensor in found["same"])
    assert found["nan"].isnan()
    with pytest.raises(TypeError, match="object cannot be in a checkpoint"):
        write_checkpoint(tmp_path / "two", {"what": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "changed", "empty"])
def test_every_damage_is_found(tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "one"
    write_checkpoint(folder, {"weights": torch.arange(100.0), "step": 3})
    file = folder / name
    content = file.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:middle], "changed": changed, "empty": b""}[how])
    with pytest.raises(CorruptCheckpoint):
        read_checkpoint(folder)
