"""A worker: base and data of a study, loaded once in a process of its own, and the trials that it is given."""

from __future__ import annotations

import logging
import os
import platform
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora import __version__
from adaptive_lora.errors import ConfigError, TrackingError, TrialFailed, WorkerError
from adaptive_lora.interruption import Interrupted, TrainingPaused
from adaptive_lora.runner.engines.messages import (
    Alive,
    Assignment,
    Broken,
    Died,
    Ended,
    LegEnd,
    Message,
    Ready,
    Shown,
    WorkerSetup,
    node_name,
)  # fmt: skip

if TYPE_CHECKING:
    from adaptive_lora.runner.schedule import Leg
    from adaptive_lora.training import StepEvent

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
_PAUSE = 0.25
"""Minimum seconds between two step messages of a trial."""
_PULSE = 1.0
"""Minimum seconds between two signs of life."""
_OUTAGE = 120.0
"""Seconds for which a worker that starts waits for a tracking server that is away."""
_ARRIVAL = 10.0
"""Seconds without progress after which a trial's records are left to be delivered beside the next trial."""


def versions() -> dict[str, str]:
    """Return the versions that must be equal in all processes of a study."""
    return {
        "Python": platform.python_version(),
        "adaptive-lora": __version__,
        **{name: version(name) for name in _PACKAGES},
    }


class Worker:
    """Runs the groups of legs that it is given, one after another, until it is stopped."""

    def __init__(self, setup: WorkerSetup, send: Callable[[Message], None]) -> None:
        """Prepare a worker; base and data are loaded by `serve`.

        Args:
            setup: study to work for.
            send: function that delivers a message to the study's process; called from several threads.
        """
        self._setup, self._send = setup, send
        self._assignments: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._pulsed = 0.0

    def assign(self, assignment: Assignment) -> None:
        """Run a group of legs as soon as the present one has ended."""
        self._assignments.put(assignment)

    def stop(self) -> None:
        """End: the trial in progress writes a checkpoint at its next step or forward pass."""
        self._stopped.set()
        self._assignments.put(None)

    def serve(self) -> None:
        """Load base and data, and run what is assigned until `stop`; errors are sent, not raised."""
        try:
            context, study = self._opened()
            try:
                self._send(Ready())
                while (assignment := self._assignments.get()) is not None:
                    self._run(context, study, assignment.legs)
                study.store.settle()
            finally:
                study.store.close()
            self._send(Died("it was stopped"))
        except KeyboardInterrupt:  # by `stop`; its trial is checkpointed
            self._send(Died("it was stopped"))
        except BaseException as error:
            self._send(Broken.of(error))

    def _opened(self) -> tuple[Any, Any]:
        """Return the context of the study, loaded in this process, and its parent run."""
        setup = self._setup
        _require_versions(setup)
        os.environ.update(setup.environment)
        os.environ.pop("MLFLOW_RUN_ID", None)  # that of the study's process
        _enter_folder(setup)
        import torch

        from adaptive_lora.runner.context import StudyContext
        from adaptive_lora.tracking import StudyRun, connect

        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        context = StudyContext(setup.config, precision=setup.precision)
        _require_equal(setup, context.fingerprint)
        _first_module(context.base.model).register_forward_pre_hook(lambda *given: self._pulse())
        place = replace(setup.config.tracking, tracking_uri=setup.tracking_uri, experiment=setup.experiment)
        until = time.monotonic() + _OUTAGE
        while True:
            try:
                store = connect(place, must_exist=True)
            except TrackingError:  # the study's process reaches it, or did before
                if self._stopped.is_set() or time.monotonic() >= until or not setup.tracking_uri.startswith("http"):
                    raise
                time.sleep(_PULSE)
            else:
                return context, StudyRun(store, setup.run_id, setup.study_id)

    def _run(self, context: Any, study: Any, legs: Sequence[Leg]) -> None:
        from adaptive_lora.models.collector import modules_uncollected
        from adaptive_lora.runner.engines.here import run_group

        with modules_uncollected():
            outcomes = run_group(context, study, legs, WorkerProgress(self._send, self._pulse))
        if not study.store.outbox.drain(_ARRIVAL) and any(leg.pause_at is not None for leg in legs):
            study.store.settle()  # a race decides by what the store has; other records may come later
        self._send(Ended(tuple(_leg_end(outcome) for outcome in outcomes)))

    def _pulse(self) -> None:
        """Give a sign of life; raise `Interrupted` if the worker was stopped."""
        if self._stopped.is_set():
            raise Interrupted(signal.SIGTERM)
        now = time.monotonic()
        if now - self._pulsed >= _PULSE:
            self._pulsed = now
            self._send(Alive())


class WorkerProgress:
    """The part of the progress display that a trial uses; its calls are sent to the study's process."""

    def __init__(self, send: Callable[[Message], None], pulse: Callable[[], None]) -> None:
        """Send calls by a function; `pulse` is called at every step."""
        self._send, self._pulse = send, pulse
        self._last = 0.0

    def begin(self, label: str) -> None:
        """Show the name of a trial that starts."""
        self._send(Shown("begin", (label,)))

    def note(self, text: str) -> None:
        """Print a line above the display."""
        self._send(Shown("note", (text,)))

    def end(self, label: str, text: str) -> None:
        """Print a trial's outcome and count it."""
        self._send(Shown("end", (label, text)))

    def step(self, label: str, event: StepEvent) -> None:
        """Show step and loss of a trial, a few times a second."""
        self._pulse()
        if time.monotonic() - self._last >= _PAUSE or event.step == event.total_steps:
            self._last = time.monotonic()
            self._send(Shown("step", (label, event)))


class Forwarded(logging.Handler):
    """Sends warnings of a worker's process to the study's, which prints them with the worker's name."""

    def __init__(self, send: Callable[[Message], None], name: str) -> None:
        super().__init__(logging.WARNING)
        self._forward, self._worker = send, name

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record as a line of text."""
        self._forward(Shown("warn", (f"{self._worker}: {record.getMessage()}",)))


def _leg_end(outcome: object) -> LegEnd:
    """Return how a leg ended, without its results, which are in the store."""
    failure = str(outcome) if isinstance(outcome, TrialFailed) else ""
    return LegEnd(paused=isinstance(outcome, TrainingPaused), failure=failure)


def _require_versions(setup: WorkerSetup) -> None:
    """Refuse to work with other versions than the study's process, which could give other numbers.

    Raises:
        WorkerError: a version differs; both are named.
    """
    own = versions()
    other = [f"{name} {own.get(name)} (required {wanted})" for name, wanted in setup.versions.items()
             if own.get(name) != wanted]  # fmt: skip
    if other:
        raise WorkerError(
            f"its versions differ from those where the study was started: {', '.join(other)}. Install equal ones "
            "on all nodes, for example from one image or environment."
        )


def _enter_folder(setup: WorkerSetup) -> None:
    """Enter the study's working folder, or one of this machine where it does not exist; check that paths exist.

    Raises:
        WorkerError: a path of the settings exists only where the study was started.
    """
    if Path(setup.folder).is_dir():
        os.chdir(setup.folder)
    else:
        own = Path(tempfile.gettempdir()) / f"adaptive-lora-{setup.study_id}"
        own.mkdir(parents=True, exist_ok=True)
        os.chdir(own)
    missing = [path for path in setup.paths if not Path(path).exists()]
    if missing:
        raise WorkerError(
            f"{missing[0]} exists where the study was started, not on {node_name()}; put it into a folder that all "
            "nodes share, at the same path, or use a hub id."
        )


def _require_equal(setup: WorkerSetup, own: Any) -> None:
    """Refuse a base or data that differ from the study's.

    Raises:
        ConfigError: they differ; both digests are named.
    """
    for name, wanted in setup.fingerprint.items():
        if own.get(name) != wanted:
            raise ConfigError(
                f"{name} on {node_name()} differs from where the study was started: required {wanted:.16}, got "
                f"{own.get(name, 'none'):.16}; all nodes must see the same files and hub revision."
            )


def _first_module(model: Any) -> Any:
    """Return a module that every forward pass calls, whatever is built on the others: the input embeddings."""
    try:
        return model.get_input_embeddings() or model
    except (NotImplementedError, AttributeError):
        return model
