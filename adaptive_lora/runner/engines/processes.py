"""Worker processes on this machine: one on each GPU, or several that share the CPU's cores."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from adaptive_lora.errors import ConfigError
from adaptive_lora.runner.engines.dispatch import Inbox, WorkerHandle
from adaptive_lora.runner.engines.messages import Assignment, Died, WorkerSetup

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LAST_CHECKPOINT = 10.0
"""Seconds that a worker has for a checkpoint when the study's process has been killed."""


class LocalWorker:
    """A worker process on this machine, connected by a pipe."""

    def __init__(self, name: str, setup: WorkerSetup, environment: dict[str, str], inbox: Inbox) -> None:
        """Start the process.

        Args:
            name: name for messages.
            setup: study to work for.
            environment: environment variables of the process.
            inbox: receives its messages.
        """
        self.name = name
        self._connection, theirs = Pipe()
        # A session of its own: Ctrl-C reaches this process alone, which then stops the workers in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        self._connection.send((name, setup))
        threading.Thread(target=self._receive, args=(inbox,), name=name, daemon=True).start()

    def _receive(self, inbox: Inbox) -> None:
        while True:
            try:
                inbox.put((self, self._connection.recv()))
            except (EOFError, OSError):
                code = self._process.wait()
                inbox.put((self, Died(_reason(code))))
                return

    def assign(self, assignment: Assignment) -> None:
        """Give it a group of legs; a process that has just ended gives them back with its `Died`."""
        self._tell(assignment)

    def stop(self) -> None:
        """Ask it to end."""
        self._tell(None)

    def _tell(self, message: Assignment | None) -> None:
        try:
            self._connection.send(message)
        except OSError:
            logging.getLogger(__name__).debug("%s has ended", self.name)

    def kill(self) -> None:
        """End its process at once, and all that it started."""
        if self._process.poll() is not None:  # its number may be another process's by now
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _reason(code: int) -> str:
    """Return why a process ended, by its exit code."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the system does that where memory is short" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


class ProcessPool:
    """Worker processes on this machine."""

    def __init__(self, setup: WorkerSetup, places: Sequence[dict[str, str]], names: Sequence[str]) -> None:
        """Prepare the pool; no process is started.

        Args:
            setup: study to work for.
            places: environment variables that give a worker its GPU or its number of threads, one per worker.
            names: names of the workers.
        """
        self._setup, self._places, self._names = setup, list(places), list(names)
        threads = self._places[0].get("OMP_NUM_THREADS")
        each = "one on each GPU" if threads is None else f"{threads} {'thread' if threads == '1' else 'threads'} each"
        self.description = f"{len(self._places)} worker {'process' if len(self._places) == 1 else 'processes'}, {each}"
        self.uses_gpus = any(place[_VISIBLE] for place in self._places)
        self._started: dict[int, LocalWorker] = {}

    def start(self, inbox: Inbox) -> WorkerHandle | None:
        """Start a worker in the first free place."""
        for number, place in enumerate(self._places):
            if number not in self._started or self._started[number]._process.poll() is not None:
                environment = {**os.environ, **place}
                environment.pop("MLFLOW_RUN_ID", None)
                self._started[number] = LocalWorker(self._names[number], self._setup, environment, inbox)
                return self._started[number]
        return None

    def exclude(self, worker: WorkerHandle) -> bool:
        """Return False: there is only this machine."""
        return False

    def close(self) -> None:
        """Wait for the processes, which have ended or been killed."""
        for worker in self._started.values():
            worker._process.wait()


def places_on_gpus(devices: str, count: int) -> tuple[list[dict[str, str]], list[str]]:
    """Return the environment of a worker on each of the GPUs asked for, and the workers' names.

    Args:
        devices: `all`, or numbers separated by commas.
        count: number of GPUs that this process sees.

    Raises:
        ConfigError: there are no such GPUs.
    """
    if count == 0:
        raise ConfigError(f"devices {devices}: this machine has no GPU that torch can use; --workers N shares its CPU.")
    numbers = list(range(count)) if devices == "all" else [int(word) for word in devices.split(",")]
    absent = [number for number in numbers if number >= count]
    if absent or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"devices {devices}: required different numbers from 0 to {count - 1}, the GPUs of this machine."
        )
    own = os.environ.get(_VISIBLE)
    seen = own.split(",") if own else [str(number) for number in range(count)]
    return [{_VISIBLE: seen[number]} for number in numbers], [f"worker on GPU {number}" for number in numbers]


def places_on_cpu(workers: int, threads: int) -> tuple[list[dict[str, str]], list[str]]:
    """Return the environment of workers that share this machine's threads, and the workers' names.

    Args:
        workers: number of workers.
        threads: number of threads that one process uses here.
    """
    share = str(max(1, threads // workers))
    places = [{"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, _VISIBLE: ""} for _ in range(workers)]
    return places, [f"worker {number + 1}" for number in range(workers)]


def _serve(descriptor: int) -> None:
    """Serve as a worker for the process at the other end of a pipe, and end when it does."""
    from adaptive_lora.models.threads import bound_spinning
    from adaptive_lora.runner.engines.worker import Forwarded, Worker

    bound_spinning()
    connection: Connection[Any, Any] = Connection(descriptor)
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            try:
                connection.send(message)
            except OSError:  # the study's process is gone; `listen` ends this one
                return

    name, setup = connection.recv()
    logging.getLogger().addHandler(Forwarded(send, name))
    worker = Worker(setup, send)

    def listen() -> None:
        while True:
            try:
                assignment = connection.recv()
            except (EOFError, OSError):  # the study's process is gone: nobody ends this one if it hangs
                worker.stop()
                time.sleep(_LAST_CHECKPOINT)
                os._exit(1)
            if assignment is None:
                worker.stop()
            else:
                worker.assign(assignment)

    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    threading.Thread(target=listen, name="listen", daemon=True).start()
    worker.serve()
    connection.close()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
