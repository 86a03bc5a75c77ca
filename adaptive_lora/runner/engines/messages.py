"""Messages between a worker process and the study's own process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora import errors
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdaptiveLoraError, WorkerError
from adaptive_lora.runner.schedule import Leg


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """Settings and places with which a worker runs trials of a study; they are sent once."""

    config: StudyConfig
    precision: str
    """Compute type of the study, `auto` resolved."""
    study_id: str
    run_id: str
    """Id of the study's parent run."""
    tracking_uri: str
    """URI of the tracking store; may contain credentials."""
    experiment: str
    """Name of the MLflow experiment."""
    fingerprint: Mapping[str, str]
    """Digests of base and data of the study, which the worker's must equal."""
    versions: Mapping[str, str]
    """Package -> version in the study's process, which the worker's must equal."""
    folder: str
    """Working folder of the study's process."""
    paths: tuple[str, ...]
    """Files and folders that the settings name and that exist where the study was started."""
    environment: Mapping[str, str]
    """Environment variables of the tracking store's access."""
    threads: int | None
    """Number of torch's threads; None: those of the environment."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded base and data."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The worker has made a forward pass since its last message."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A call of the study's progress display."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker has run a group of legs to its end."""

    outcomes: tuple[LegEnd, ...]
    """One per leg, in order."""


@dataclass(frozen=True, slots=True)
class LegEnd:
    """End of a leg in a worker."""

    paused: bool = False
    """State of the trial: true if it was paused for the other rates of a race."""
    failure: str = ""
    """Reason of its failure; empty: it did not fail."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An error that ended a worker, or the group that it ran."""

    kind: str
    """Name of the exception's class."""
    text: str
    trace: str
    """Traceback as text."""
    local: bool
    """Cause of the error: true if it is the worker's machine, such as a full disk; another worker may do better."""

    @classmethod
    def of(cls, error: BaseException) -> Broken:
        """Describe an exception in words, because not every exception survives being sent."""
        trace = "".join(traceback.format_exception(error))
        causes = (error, error.__cause__)  # a full disk is an error of this package with its cause
        return cls(
            type(error).__name__, str(error), trace, any(isinstance(one, OSError | MemoryError) for one in causes)
        )

    def raised(self, worker: str) -> BaseException:
        """Return the exception to raise in the study's process: this package's own, or a bug with its traceback."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, AdaptiveLoraError):
            error = kind.__new__(kind)
            AdaptiveLoraError.__init__(error, f"{worker}: {self.text}")
            return error
        if self.local:
            return WorkerError(f"{worker}: {self.kind}: {self.text}")
        return RuntimeError(f"{worker} ended with an error of this package:\n{self.trace}")


@dataclass(frozen=True, slots=True)
class Died:
    """The worker's process has ended without a word."""

    reason: str
    lost_node: bool = False
    """State of the worker's node: true if it left the cluster, which says nothing of the trial."""


Message = Ready | Alive | Shown | Ended | Broken | Died


@dataclass(frozen=True, slots=True)
class Assignment:
    """A group of legs for a worker: one, or several to be trained together."""

    legs: tuple[Leg, ...]


def node_name() -> str:
    """Return this machine's name for messages."""
    return os.uname().nodename
