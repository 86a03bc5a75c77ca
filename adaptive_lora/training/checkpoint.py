"""The checkpoints of one trial: when they are written, which are kept, and where it goes on."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adaptive_lora.config import digest
from adaptive_lora.training.checkpoint_files import PARTIAL, CorruptCheckpoint, read_checkpoint, write_checkpoint
from adaptive_lora.training.state import TrainerState, is_snapshot, steps_of

_KEPT = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frequency:
    """When a checkpoint is due; with both, whichever comes first."""

    minutes: float
    """Since the last one, or since the training began."""
    steps: int | None = None
    """Optimiser steps since then; None: by time alone."""


class TrialCheckpoints:
    """A folder of one trial's checkpoints.

    A recipe may train several times. The last two checkpoints of each training are kept until the
    trial is finished: those at the end of a training bring its result back without a step.
    """

    def __init__(self, folder: Path, frequency: Frequency) -> None:
        """Keep checkpoints in a folder, which is made when the first is written.

        Args:
            folder: the trial's own; what a dead process was writing there is removed.
            frequency: how often.
        """
        self.folder, self.frequency = folder, frequency
        self.seconds_before = 0.0
        """Wall time that earlier processes spent on the trial, up to where this one goes on."""
        self._started = time.monotonic()
        for left in folder.glob(f"*{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)

    @property
    def seconds(self) -> float:
        """Wall time spent on the trial so far, in all processes."""
        return self.seconds_before + time.monotonic() - self._started

    def of(self, training: int, model: nn.Module) -> TrainingCheckpoints:
        """Return the checkpoints of one training.

        Args:
            training: from 1.
            model: as it is before its first step.
        """
        return TrainingCheckpoints(self, training, _layout(model))

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give a folder for the trial's other files; what a dead process left there is removed."""
        place = self.folder / "work"
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def remove(self) -> None:
        """Remove all: the trial is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for home in (self.folder.parent, self.folder.parent.parent):
            with suppress(OSError):  # not empty
                home.rmdir()


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _layout(model: nn.Module) -> str:
    """Return a digest of the names and shapes of what is trained."""
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return digest({"trained": shapes})


class TrainingCheckpoints:
    """The checkpoints of one training of a trial."""

    def __init__(self, trial: TrialCheckpoints, training: int, layout: str) -> None:
        """Use `TrialCheckpoints.of`.

        Args:
            trial: whose training it is.
            training: from 1.
            layout: digest of what is trained; checkpoints of another layout are of no use.
        """
        self._trial, self._training, self._layout = trial, training, layout
        self._step, self._written = 0, time.monotonic()

    def latest(self) -> TrainerState | None:
        """Return the newest snapshot that can be read, with a warning for each that cannot."""
        for folder in reversed(self._folders()):
            try:
                values = read_checkpoint(folder)
            except CorruptCheckpoint as error:
                _log.warning("checkpoint %s is damaged and left out: %s", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if not (is_snapshot(values.get("snapshot")) and _is_time(values.get("seconds"))):
                _log.warning("checkpoint %s is not as it was written and left out.", folder)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if values.get("layout") != self._layout:
                _log.warning("checkpoint %s is of other ranks or sites and left out.", folder)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            snapshot: TrainerState = values["snapshot"]
            self._step = steps_of(snapshot)
            self._trial.seconds_before = values["seconds"]
            return snapshot
        return None

    def stepped(self, step: int, take: Callable[[], TrainerState]) -> None:
        """Write a checkpoint where one is due."""
        frequency = self._trial.frequency
        by_steps = frequency.steps is not None and step - self._step >= frequency.steps
        if by_steps or time.monotonic() - self._written >= 60 * frequency.minutes:
            self.write(step, take)

    def write(self, step: int, take: Callable[[], TrainerState]) -> None:
        """Write a checkpoint now; a disk that takes none is a warning, not the trial's end."""
        self._step, self._written = step, time.monotonic()
        values: dict[str, Any] = {"layout": self._layout, "seconds": self._trial.seconds, "snapshot": take()}
        folder = self._trial.folder / f"training{self._training}-step{step:09}"
        try:
            write_checkpoint(folder, values)
        except OSError as error:
            _log.warning("no checkpoint at step %d: %s. The trial goes on without.", step, error)
            return
        for old in self._folders()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Return the folders of this training, by step."""
        found = self._trial.folder.glob(f"training{self._training}-step*")
        return sorted(path for path in found if PARTIAL not in path.name)
