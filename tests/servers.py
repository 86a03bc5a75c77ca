"""Real servers on this machine only: MLflow's, and a proxy before one that injects faults."""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PATIENCE = 120.0
"""Seconds after which a server is given up."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class MlflowProcess:
    """An `mlflow` command that serves, which can be killed and started again."""

    def __init__(self, words: list[str], path: str, folder: Path, **extra: str) -> None:
        """Start it; `path` is what answers once it is ready.

        Args:
            words: of the `mlflow` command, or one script that takes HOST and PORT.
            path: what answers once it is ready.
            folder: where it runs.
            extra: environment variables.
        """
        self.port, self._path, self._folder = free_port(), path, folder
        if len(words) == 1:
            self._words, extra = words, {**extra, "PORT": str(self.port)}
        else:
            self._words = [sys.executable, "-m", "mlflow", *words]
            self._words += ["--host", "127.0.0.1", "--port", str(self.port)]
        python = Path(sys.executable).parent
        self._environment = {
            **os.environ,
            "PATH": f"{python}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes less
            **extra,
        }
        self.log = folder / f"{Path(words[0]).stem}.log"
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._words,
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its workers end with it
            )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}{self._path}", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.stop()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        pytest.fail(f"{self.address} does not answer:\n{text}")

    def stop(self, number: int = 15) -> None:
        """End the server and its workers with a signal."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()


@contextmanager
def serving(words: list[str], path: str, folder: Path, **extra: str) -> Iterator[str]:
    """Run an `mlflow` command that serves; yield its address once `path` answers."""
    server = MlflowProcess(words, path, folder, **extra)
    try:
        yield server.address
    finally:
        server.stop()


def tracking_words(backend: str, artifacts: Path) -> list[str]:
    """Return the command of a tracking server that passes artifacts on."""
    words = ["server", "--backend-store-uri", backend, "--workers", "1"]
    return [*words, "--artifacts-destination", str(artifacts), "--serve-artifacts"]


class Fault(StrEnum):
    """What can go wrong with one request."""

    DOWN = "connection reset at once"
    LOST = "reset after the server has obeyed"
    INTERNAL = "500"
    BUSY = "429"
    FULL = "507"
    SLOW = "2 s late"
    CUT_REQUEST = "request body cut"
    CUT_ANSWER = "answer body cut"


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a server and spoils some of them, by a seeded random schedule."""

    daemon_threads = True

    def __init__(self, upstream: int, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.share = 0.0
        """Of the requests that are spoiled."""
        self.down = False
        """Whether the server is away altogether."""
        self.lacks = ""
        """Part of the paths that the server does not know; empty: it knows all."""
        self.slowness = 2.0
        """Seconds of `Fault.SLOW`."""
        self.injected: Counter[Fault] = Counter()
        self.requests = 0
        self._random, self._bag = random.Random(seed), list[Fault]()
        self._guard = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> Fault | None:
        """Choose what happens to the next request."""
        with self._guard:
            self.requests += 1
            fault = Fault.DOWN if self.down else None
            if fault is None and self._random.random() < self.share:
                if not self._bag:  # every kind comes up once before one comes up twice
                    self._bag = self._random.sample(list(Fault), len(Fault))
                fault = self._bag.pop()
            if fault is not None:
                self.injected[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: broken connections are what this proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def do_GET(self) -> None:
        """Pass a request on, or spoil it."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw()
        if fault is Fault.DOWN:
            self._reset()
            return
        if fault in (Fault.INTERNAL, Fault.BUSY, Fault.FULL):
            self.send_response(int(fault.value))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.server.lacks and self.server.lacks in self.path:
            self.send_error(404)
            return
        if fault is Fault.SLOW:
            time.sleep(self.server.slowness)
        if fault is Fault.CUT_REQUEST and body:
            self._cut_request(body)
            return
        status, headers, answer = self._ask(body)
        if fault is Fault.LOST:
            self._reset()
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if fault is Fault.CUT_ANSWER:
            self.wfile.write(answer[: len(answer) // 2])
            self._reset()
            return
        self.wfile.write(answer)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except OSError:
            return 502, [], b"the server is not there"
        finally:
            connection.close()

    def _cut_request(self, body: bytes) -> None:
        """Let the server see half of a request."""
        lines = [f"{self.command} {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        half = "\r\n".join([*lines, "", ""]).encode("latin-1") + body[: len(body) // 2]
        where = ("127.0.0.1", self.server.upstream)
        with suppress(OSError), socket.create_connection(where, 10) as upstream:
            upstream.sendall(half)
        self._reset()

    def _reset(self) -> None:
        """Close the connection in the hard way, as a machine that goes away does."""
        self.close_connection = True
        self.wfile.flush()
        hard = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class SmallDisk:
    """A folder on a disk of its own that can be filled up; an ordinary one without root."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        self.own = os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0

    def fill(self) -> None:
        """Leave no byte free, where the disk is one of its own."""
        if self.own:
            with suppress(OSError), self._filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"0" * 4096)

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    def remove(self) -> None:
        """Take the disk away."""
        if self.own:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
