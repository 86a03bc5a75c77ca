"""The checkpoints of one trial: when they are written, which are kept, and where training continues."""

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
from adaptive_lora.interruption import PARTIAL, remove_partial
from adaptive_lora.training.checkpoint_files import CorruptCheckpoint, read_checkpoint, write_checkpoint
from adaptive_lora.training.mirror import CheckpointMirror
from adaptive_lora.training.state import TrainerState, is_snapshot, steps_of

_KEPT = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frequency:
    """Interval between checkpoints; with both limits, whichever is reached first."""

    minutes: float
    """Minutes since the last checkpoint, or since the start of training."""
    steps: int | None = None
    """Optimiser steps since then; None: by time alone."""


class TrialCheckpoints:
    """The folder of one trial's checkpoints.

    A method may train several times. The last two checkpoints of each training are kept until the
    trial is finished: one at the end of a training restores its result without another step. They are
    copied to a storage that other machines reach, if there is one, and training continues from the newest of
    both places.
    """

    def __init__(self, folder: Path, frequency: Frequency, mirror: CheckpointMirror | None = None) -> None:
        """Use a folder, which is created when the first checkpoint is written.

        Args:
            folder: folder of this trial alone; unfinished files of a dead process are removed.
            frequency: interval between checkpoints.
            mirror: storage of copies; None: only the folder.
        """
        self.folder, self.frequency, self.mirror = folder, frequency, mirror
        self.seconds_before = 0.0
        """Wall time in seconds that earlier processes spent on the trial, up to the restored checkpoint."""
        self._started = time.monotonic()
        remove_partial(folder, "training")

    @property
    def seconds(self) -> float:
        """Wall time in seconds spent on the trial so far, in all processes."""
        return self.seconds_before + time.monotonic() - self._started

    def of(self, training: int, model: nn.Module) -> TrainingCheckpoints:
        """Return the checkpoints of one training.

        Args:
            training: number of the training within the trial, from 1.
            model: model before the first step.
        """
        return TrainingCheckpoints(self, training, _layout(model))

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Provide a folder for the trial's other files; files left by a dead process are removed."""
        place = self.folder / "work"
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def remove(self) -> None:
        """Remove all checkpoints of a finished trial."""
        if self.mirror is not None:
            self.mirror.remove_all()
        shutil.rmtree(self.folder, ignore_errors=True)
        for home in (self.folder.parent, self.folder.parent.parent):
            with suppress(OSError):  # not empty
                home.rmdir()


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _layout(model: nn.Module) -> str:
    """Return a digest of the names and shapes of the trained parameters."""
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return digest({"trained": shapes})


class TrainingCheckpoints:
    """The checkpoints of one training of a trial."""

    def __init__(self, trial: TrialCheckpoints, training: int, layout: str) -> None:
        """Use `TrialCheckpoints.of` instead.

        Args:
            trial: checkpoints of the trial.
            training: number of the training within the trial, from 1.
            layout: digest of the trained parameters; checkpoints of another layout are ignored.
        """
        self._trial, self._prefix, self._layout = trial, f"training{training}-step", layout
        self._step, self._written = 0, time.monotonic()

    def latest(self) -> TrainerState | None:
        """Return the newest readable snapshot; unreadable ones give a warning."""
        for folder in self._newest_first():
            values, problem = self._read(folder)
            if problem:
                _log.warning("checkpoint %s %s", folder, problem)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            snapshot: TrainerState = values["snapshot"]
            self._step = steps_of(snapshot)
            self._trial.seconds_before = values["seconds"]
            return snapshot
        return None

    def _newest_first(self) -> Iterator[Path]:
        """Yield checkpoint folders; one that the caller removes is fetched from the storage if it is there too."""
        mirror, here = self._trial.mirror, {folder.name for folder in self._folders()}
        mirrored = set() if mirror is None else mirror.names(self._prefix)
        for name in sorted(here | mirrored, reverse=True):
            folder = self._trial.folder / name
            if name in here:
                yield folder
            if mirror is not None and name in mirrored and not folder.exists() and mirror.fetch(name, folder):
                yield folder
                mirror.remove([name])

    def _read(self, folder: Path) -> tuple[dict[str, Any], str]:
        """Return the content of a checkpoint, and why it cannot be used; empty if it can."""
        try:
            values = read_checkpoint(folder)
        except CorruptCheckpoint as error:
            return {}, f"is corrupt and ignored: {error}"
        if not (is_snapshot(values.get("snapshot")) and _is_time(values.get("seconds"))):
            return {}, "was changed after it was written and is ignored."
        return values, "" if values.get("layout") == self._layout else "has other ranks or sites and is ignored."

    def stepped(self, step: int, take: Callable[[], TrainerState]) -> None:
        """Write a checkpoint if one is due."""
        frequency = self._trial.frequency
        by_steps = frequency.steps is not None and step - self._step >= frequency.steps
        if by_steps or time.monotonic() - self._written >= 60 * frequency.minutes:
            self.write(step, take)

    def write(self, step: int, take: Callable[[], TrainerState]) -> None:
        """Write a checkpoint now; a failed write is a warning and does not end the trial."""
        self._step, self._written = step, time.monotonic()
        values: dict[str, Any] = {"layout": self._layout, "seconds": self._trial.seconds, "snapshot": take()}
        folder = self._trial.folder / f"{self._prefix}{step:09}"
        try:
            write_checkpoint(folder, values)
        except OSError as error:
            _log.warning("no checkpoint at step %d: %s. The trial continues without.", step, error)
            return
        for old in self._folders()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        if mirror := self._trial.mirror:
            mirror.put(folder)
            mirror.remove(sorted(mirror.names(self._prefix))[:-_KEPT])

    def _folders(self) -> list[Path]:
        """Return the checkpoint folders of this training, by step."""
        found = self._trial.folder.glob(f"{self._prefix}*")
        return sorted(path for path in found if PARTIAL not in path.name)
