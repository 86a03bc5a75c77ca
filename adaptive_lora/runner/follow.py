"""Trials over several processes: the first leads the study, the others train with it and record nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed
from adaptive_lora.interruption import TrainingPaused, interruptible
from adaptive_lora.models.distributed import Abandoned
from adaptive_lora.models.sharding import gather_in_forward, place
from adaptive_lora.results import EvalResult
from adaptive_lora.training import StepEvent

if TYPE_CHECKING:
    import torch

    from adaptive_lora.runner.context import StudyContext


@contextmanager
def led_by_first(context: StudyContext) -> Iterator[None]:
    """Run the block in the first process; each other one trains what it announces, and ends when the block does.

    Raises:
        SystemExit: this is another process, and the first one has ended its block.
        ProcessLost: base, data or precision differ between the processes.
    """
    processes = context.runtime.processes
    if processes.count == 1:
        yield
        return
    for what, found in context.fingerprint.items():
        processes.require_equal(f"the study's {what}", found)
    if processes.sharded:
        _score_base(context)
    if not processes.leads:
        _follow(context)
        sys.exit(0)
    try:
        yield
    finally:
        if not processes.out_of_step:
            processes.share(None)


def _score_base(context: StudyContext) -> None:
    """Score the base, of which no process can run a forward pass alone, before the first one needs the scores."""
    for kind in {spec.base: None for spec in context.config.specs} | {context.base_kind: None}:
        for fold in range(context.config.data.folds):
            context.on_base(kind).base_scores(fold)
    _ = context.retained_before


def announce(context: StudyContext, trial: TrialSpec, pause_at: int | None) -> None:
    """Let the other processes run a trial with this one, up to a step or, with None, to its end."""
    if context.runtime.processes.count > 1:
        context.runtime.processes.share(_Training(context.signature(trial), pause_at))


def reloaded_together(context: StudyContext, folder: Path, fold: int, base: str) -> tuple[EvalResult, torch.Tensor]:
    """Return the test scores and the probe of a saved adapter on a divided base, which all processes run.

    Args:
        context: context of the study.
        folder: folder of the adapter, which the other processes need not reach.
        fold: fold whose test split is scored.
        base: storage of the base's weights.
    """
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    order = context.runtime.processes.share(_Reloading(files, fold, base))
    return _reload(context, order)


@dataclass(frozen=True)
class _Training:
    """Order to run a trial."""

    signature: str
    pause_at: int | None


@dataclass(frozen=True)
class _Reloading:
    """Order to score a saved adapter."""

    files: Mapping[str, bytes]
    fold: int
    base: str


def _follow(context: StudyContext) -> None:
    """Do what the first process orders until it has ended its block."""
    from adaptive_lora.runner.trial import run_trial

    trials = {context.signature(trial): trial for trial in context.config.trials()}
    order: _Training | _Reloading | None = None
    with interruptible():
        while (order := context.runtime.processes.share(order)) is not None:
            if isinstance(order, _Reloading):
                _reload(context, order)
                continue

            def on_step(event: StepEvent, pause_at: int | None = order.pause_at) -> None:
                if event.step == pause_at:
                    raise TrainingPaused

            with suppress(TrialFailed, TrainingPaused, Abandoned):  # of all processes; the first one records them
                run_trial(context, trials[order.signature], Path(), on_step)


def _reload(context: StudyContext, order: _Reloading) -> tuple[EvalResult, torch.Tensor]:
    """Attach a saved adapter to the base, by PEFT alone, and score it."""
    from peft import PeftModel

    from adaptive_lora.methods.adapters.tuners import detach_peft_tuner

    context = context.on_base(order.base)
    base: Any = context.base.model
    with TemporaryDirectory() as folder, context.runtime.processes.one_trial():
        for name, content in order.files.items():
            (Path(folder) / name).write_bytes(content)
        adapted = PeftModel.from_pretrained(base, folder)
        try:
            gather_in_forward(adapted)
            place(adapted, context.runtime.device)
            test = context.splits(order.fold).test
            return context.losses(adapted, test), context.task.probe(adapted, test)
        finally:
            detach_peft_tuner(adapted)
