"""Out of memory: the same step in smaller parts, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tracked import trials_in

from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import ModelError, TrialFailed
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.steps import run_train
from adaptive_lora.runner.trial import TrialOutcome, run_trial
from adaptive_lora.training.memory.shortage import is_out_of_memory

BaseContext = Callable[..., StudyContext]
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to 1"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
]


@contextmanager
def room_for(model: torch.nn.Module, examples: int, error: Exception) -> Iterator[list[int]]:
    """Let training passes of more examples fail, deep in the model; collect their sizes."""
    sizes: list[int] = []

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            sizes.append(len(inputs[0]))
            if sizes[-1] > examples:
                raise error

    hook = model.get_submodule("transformer.h.1").register_forward_pre_hook(refuse)
    try:
        yield sizes
    finally:
        hook.remove()


def run(context: StudyContext, folder: Path) -> TrialOutcome:
    return run_trial(context, next(context.config.trials()), folder)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_smaller_micro_batch_gives_the_same_losses(
    make_bench: BaseContext, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_bench(
        methods="uniform:rank=2", batch_size=8, accumulation=2, batching="padded",
        base_dropout=False,
    )  # fmt: skip
    expected = run(context, tmp_path / "whole")
    with room_for(context.base.model, 3, error) as sizes:
        found = run(context, tmp_path / "parts")
    assert sizes[0] == 8
    assert sizes.count(8) == 1  # later steps do not try again
    assert found.train.losses == pytest.approx(expected.train.losses, rel=1e-6)
    assert found.test.loss == pytest.approx(expected.test.loss, rel=1e-6)
    assert found.train.order_digest == expected.train.order_digest
    assert (expected.train.micro_batch, found.train.micro_batch) == (8, 2)
    assert found.train.step_tokens == expected.train.step_tokens
    assert found.train.supervised_tokens == expected.train.supervised_tokens
    assert "continuing with 2" in caplog.text


def test_one_example_that_does_not_fit_fails_the_trial_and_is_recorded(
    in_store: Callable[..., StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from io import StringIO

    from rich.console import Console
    from transformers import GPT2Model

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    whole = GPT2Model.forward

    def only_evaluation(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return refuse(self) if self.training else whole(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", only_evaluation)
    with pytest.raises(TrialFailed, match="one example per forward pass"):
        run_train(in_store(batch_size=4), None, Console(file=StringIO()))
    (trial,) = trials_in(tmp_path)
    assert trial.info.status == "FAILED"
    assert "one example per forward pass" in trial.data.tags["failure"]


def test_other_errors_are_no_shortage(make_bench: BaseContext, tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    context = make_bench(methods="uniform:rank=2")
    matched = pytest.raises(ModelError, match=r"failed: ZeroDivisionError at transformer.h.1")
    with room_for(context.base.model, 0, ZeroDivisionError()), matched:
        run(context, tmp_path / "broken")
