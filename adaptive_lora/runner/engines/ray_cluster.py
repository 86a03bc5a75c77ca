"""Workers as actors of a Ray cluster: on this machine, or on all nodes of a cluster that is joined."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from adaptive_lora.config import WorkersConfig
from adaptive_lora.errors import ConfigError, brief, require_extra
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.runner.engines.dispatch import Inbox, WorkerHandle
from adaptive_lora.runner.engines.messages import Assignment, Died, Message, WorkerSetup
from adaptive_lora.runner.engines.worker import Forwarded, Worker

log = logging.getLogger(__name__)

_POLL = 1.0
"""Seconds for which an actor waits for its next message before it answers."""
_JOINING = 60.0
"""Seconds within which the first node with enough resources must have joined a cluster."""
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment of Ray where the user has not set it: no usage reports; GPUs stay visible where none is asked for."""
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""Further environment of a cluster of this machine alone: it listens on the loopback address, and asks for a token."""
_CONTACT = 45.0
"""Seconds without a call from the study's process after which a worker stops.

Ray takes a node that it cannot reach for dead after 65 s, and its trials are given to others: by then it must not
write any more."""
_LOOK = 5.0
"""Seconds between two looks at the nodes of the cluster."""


class _Actor:
    """The Ray actor: a worker that serves in a thread, and its messages."""

    def __init__(self, name: str, setup: WorkerSetup) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        logging.getLogger().addHandler(Forwarded(self._messages.put, name))
        self._worker, self._called = Worker(setup, self._messages.put), time.monotonic()
        threading.Thread(target=self._worker.serve, name="worker", daemon=True).start()
        threading.Thread(target=self._watch, name="contact", daemon=True).start()

    def _watch(self) -> None:
        """Stop the worker when the study's process has not called for long."""
        while time.monotonic() - self._called < _CONTACT:
            time.sleep(_POLL)
        self._worker.stop()

    def pid(self) -> int:
        return os.getpid()

    def assign(self, assignment: Assignment) -> None:
        self._worker.assign(assignment)

    def stop(self) -> None:
        self._worker.stop()

    def messages(self) -> list[Message]:
        """Return the messages since the last call, after a moment where there are none."""
        self._called, found = time.monotonic(), list[Message]()
        with suppress(queue.Empty):
            found.append(self._messages.get(timeout=_POLL))
            while True:
                found.append(self._messages.get_nowait())
        return found


class RayWorker:
    """A worker that is an actor on a node of the cluster."""

    def __init__(self, ray: Any, actor: Any, name: str, node: str, inbox: Inbox) -> None:
        """Receive the messages of a started actor.

        Args:
            ray: the module.
            actor: handle of the actor.
            name: name for messages.
            node: id of its node.
            inbox: receives its messages.
        """
        self._ray, self._actor, self.name, self.node = ray, actor, name, node
        self.gone = False
        """State of its process: true once it has ended, so that its place is free."""
        self._pid = actor.pid.remote()
        threading.Thread(target=self._receive, args=(inbox,), name=name, daemon=True).start()

    def _receive(self, inbox: Inbox) -> None:
        ray = self._ray
        try:
            while True:
                for message in ray.get(self._actor.messages.remote()):
                    if isinstance(message, Died):  # it was stopped; its process ends with its actor
                        ray.kill(self._actor, no_restart=True)
                        self.gone = True
                    inbox.put((self, message))
        except ray.exceptions.RayError as error:
            lost = not any(node["NodeID"] == self.node for node in _alive(ray))
            if isinstance(error, ray.exceptions.ActorUnavailableError):  # the cluster does not know yet
                ray.kill(self._actor, no_restart=True)
                lost = True
            short = ", because memory was short" if isinstance(error, ray.exceptions.OutOfMemoryError) else ""
            reason = "its node left the cluster" if lost else f"its process ended{short}"
            self.gone = True
            inbox.put((self, Died(reason, lost_node=lost)))
        except Exception as error:  # Ray was shut down, or its client lost the cluster
            self.gone = True
            inbox.put((self, Died(f"the connection to the cluster ended ({brief(error)})", lost_node=True)))

    def assign(self, assignment: Assignment) -> None:
        """Give it a group of legs; an actor that has just died gives them back with its `Died`."""
        self._actor.assign.remote(assignment)

    def stop(self) -> None:
        """Ask it to end."""
        self._actor.stop.remote()

    def kill(self) -> None:
        """End its process at once, even where it does not react: Ray's own way asks the process."""
        ray = self._ray
        with suppress(ray.exceptions.RayError):
            ready, _ = ray.wait([self._pid], timeout=0)
            if ready and any(node["NodeID"] == self.node for node in _alive(ray)):
                _on_node(ray, self.node, ray.remote(_end_process), num_cpus=0).remote(ray.get(self._pid))
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor, no_restart=True)


def _end_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _alive(ray: Any) -> list[dict[str, Any]]:
    """Return the nodes of the cluster that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def _on_node(ray: Any, node: str, kind: Any, **resources: Any) -> Any:
    """Return a remote function or class with its resources, to be placed on a node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **resources)


class RayPool:
    """The workers of a study in a Ray cluster."""

    def __init__(self, settings: WorkersConfig, setup: WorkerSetup) -> None:
        """Join a cluster, or start one on this machine.

        Args:
            settings: address and resources of workers.
            setup: study to work for; it is sent to each node once.

        Raises:
            MissingExtra: Ray is not installed.
            ConfigError: no cluster answers, its versions differ, or no node has the resources of one worker.
        """
        self._left = ExitStack()
        self._ray = _joined(settings, self._left)
        self._most = settings.workers
        try:
            self._gpus = settings.gpus_per_trial
            if self._gpus is None:
                self._gpus = float(any(node["Resources"].get("GPU", 0) >= 1 for node in _alive(self._ray)))
            self.uses_gpus = self._gpus > 0
            self._cpus = settings.cpus_per_trial
            self._require_room(wait=settings.ray_address is not None or "RAY_ADDRESS" in os.environ)
            self._setup = self._ray.put(setup)
            nodes = _alive(self._ray)
            room = sum(map(self._room, nodes))
            self.description = (
                f"Ray cluster of {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}, room for {room} workers of "
                f"{self._cpus} CPU{f' and {self._gpus:g} GPU' if self._gpus else ''}"
            )
        except BaseException:
            self.close()
            raise
        self._workers: list[RayWorker] = []
        self._excluded: set[str] = set()
        self._looked, self._nodes = 0.0, list[dict[str, Any]]()
        self._started = 0

    def _room(self, node: dict[str, Any]) -> int:
        """Return the number of workers that a node has resources for."""
        resources = node["Resources"]
        cpus = int(resources.get("CPU", 0) // self._cpus)
        return min(cpus, int(resources.get("GPU", 0) / self._gpus + 1e-9)) if self._gpus else cpus

    def _require_room(self, *, wait: bool) -> None:
        """Check that a node has the resources of one worker; nodes of a joined cluster may be a minute late."""
        until = time.monotonic() + (_JOINING if wait else 0.0)
        while not any(map(self._room, nodes := _alive(self._ray))):
            if time.monotonic() >= until:
                most = {
                    kind: max((node["Resources"].get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")
                }
                raise ConfigError(
                    f"no node of the Ray cluster has the resources of one worker: required {self._cpus} CPU and "
                    f"{self._gpus:g} GPU (--cpus-per-trial, --gpus-per-trial); of {len(nodes)} in it, the largest has "
                    f"{most['CPU']:g} CPU and {most['GPU']:g} GPU."
                )
            time.sleep(1.0)

    def start(self, inbox: Inbox) -> WorkerHandle | None:
        """Start a worker on the node with the most room; None if there is none."""
        left = [worker for worker in self._workers if not worker.gone]
        if len(left) < len(self._workers):
            self._workers, self._looked = left, 0.0  # their nodes may have left
        if self._most is not None and len(self._workers) >= self._most:
            return None
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked, self._nodes = now, _alive(self._ray)
        free = {
            node["NodeID"]: self._room(node) - sum(worker.node == node["NodeID"] for worker in self._workers)
            for node in self._nodes
            if node["NodeID"] not in self._excluded
        }
        best = max(free, key=lambda node: free[node], default="")
        if not best or free[best] <= 0:
            return None
        self._started += 1
        host = next(node["NodeManagerHostname"] for node in self._nodes if node["NodeID"] == best)
        name = f"Ray worker {self._started} on {host}"
        kind = _on_node(self._ray, best, self._ray.remote(_Actor), num_cpus=self._cpus, num_gpus=self._gpus,
                        max_restarts=0, max_concurrency=4)  # fmt: skip
        worker = RayWorker(self._ray, kind.remote(name, self._setup), name, best, inbox)
        self._workers.append(worker)
        return worker

    def exclude(self, worker: WorkerHandle) -> bool:
        """Start no more workers on a worker's node; return whether another node has room."""
        assert isinstance(worker, RayWorker)
        worker.gone = True
        self._excluded.add(worker.node)
        return any(self._room(node) for node in _alive(self._ray) if node["NodeID"] not in self._excluded)

    def close(self) -> None:
        """Leave the cluster; one that was started for the study ends."""
        self._left.close()


def _joined(settings: WorkersConfig, left: ExitStack) -> Any:
    """Return Ray, connected to a cluster.

    Args:
        settings: address of the cluster.
        left: receives what is to be done when the cluster is left.

    Raises:
        MissingExtra, ConfigError: as for `RayPool`.
    """
    require_extra("ray", "--engine ray")
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    further = _LOOPBACK if not address else {"RAY_AUTH_MODE": "token"} if _has_token() else {}
    for name, value in (_ENVIRONMENT | further).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # by the program that runs the study
        return ray
    words: dict[str, Any] = {"address": address} if address else {
        "address": "local", "include_dashboard": False,
    }  # fmt: skip
    try:
        with _own_signals():
            ray.init(**words, log_to_driver=False, logging_level=logging.ERROR, namespace="adaptive-lora")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster {hide_credentials(address)}" if address else "a Ray cluster on this machine"
        versions = ", which runs other versions" if "ersion mismatch" in str(error) else ""
        raise ConfigError(
            f"cannot use {where}{versions}: {brief(error)}. A cluster needs the Python and Ray of this command, and, "
            "where it asks for a token (RAY_AUTH_MODE=token), the same one here. Without --ray-address a cluster is "
            "started on this machine."
        ) from None
    left.callback(ray.shutdown)
    # A worker or node that is lost is told in one line by the dispatcher; Ray would print the end of its node's log.
    internals = ray._private.worker
    left.callback(setattr, internals, "print_to_stdstream", internals.print_to_stdstream)
    internals.print_to_stdstream = lambda data, ignore_prefix: log.debug("%s", "\n".join(data["lines"]))
    return ray


def _has_token() -> bool:
    """Return whether a token of a Ray cluster is here; Ray looks for it only where it is told to for most addresses."""
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return any(name in os.environ for name in names) or Path.home().joinpath(".ray", "auth_token").exists()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers of signals: Ray sets its own, which would end a study without checkpoints."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
