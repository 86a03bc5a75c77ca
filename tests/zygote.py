"""A process with everything imported that forks one process a command of this package or MLflow, or a program.

Real commands in real processes, without the seconds of imports of each. It reads one JSON object a
line: what to run (`words`, in `folder`), or which process to wait for (`wait`); it answers with a
line each. A fault makes the process kill itself at a given call of a function; a clock is set back
and runs backwards.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from spared import draw_text_as_outlines, freeze_modules, skip_rendering_of_studies, skip_syncs


def serve() -> None:
    """Answer requests until the input ends."""
    import torch

    for name in (
        "runner.run",
        "runner.steps",
        "cli",
        "analysis.report.formats",
        "analysis.report.figures",
        "tracking.sync",
    ):
        importlib.import_module(f"adaptive_lora.{name}")
    for name in ("transformers.models.gpt2.modeling_gpt2", "accelerate", "mlflow.pyfunc", "peft"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    skip_syncs()
    draw_text_as_outlines()
    skip_rendering_of_studies()
    freeze_modules()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status, usage = os.wait4(request["wait"], 0)
            seconds = usage.ru_utime + usage.ru_stime
            print(json.dumps([os.waitstatus_to_exitcode(status), seconds]), flush=True)
            continue
        if request["program"] == "mlflow":
            importlib.import_module("mlflow.cli")
        pid = os.fork()
        if pid == 0:
            run(request)
        print(json.dumps(pid), flush=True)


def run(request: dict[str, Any]) -> None:
    """Run one command in this new process, and end it."""
    code = 1
    try:
        os.chdir(request["folder"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "ADAPTIVE_LORA_BASE"):
            os.environ.pop(name, None)
        os.environ.update(request["variables"])
        if request["fault"]:
            arm(*request["fault"])
        if request["set_back"] is not None:
            set_back(request["set_back"])
        sys.argv = [request["program"], *request["words"]]
        if request["program"] == "mlflow":
            from mlflow.cli import cli

            os.environ.clear()
            os.environ.update(request["environment"])
            cli(request["words"])
        elif request["program"] == "python":
            program, *sys.argv[1:] = request["words"]
            exec(program, {"__name__": "__main__"})
            code = 0
        else:
            from adaptive_lora.cli import main

            main(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def set_back(seconds: float) -> None:
    """Set this process's clock back; from there it runs backwards. Monotonic clocks do not."""
    began = time.time_ns()
    start, whole = began - int(1e9 * seconds), time.time_ns
    time.time_ns = lambda: start - (whole() - began)
    time.time = lambda: time.time_ns() / 1e9


def arm(module: str, name: str, call: int, when: str, number: int = signal.SIGKILL) -> None:
    """Send this process a signal `before` or `after` the work of a function's n-th call."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, last), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), number)
        result = whole(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, last, deadly)


@dataclass(frozen=True, kw_only=True)
class End:
    """How a command ended."""

    code: int
    """Exit code, negative where a signal ended it."""
    seconds: float
    """Processor time of all its threads."""


class Zygote:
    """The test's side of it."""

    def __enter__(self) -> Zygote:
        """Start the process; the imports take seconds."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert "ready" in self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process; a command that still runs is ended by the test that began it."""
        self._process.communicate()

    def start(
        self,
        words: list[str],
        folder: Path,
        fault: tuple[Any, ...] | None = None,
        set_back: float | None = None,
        variables: dict[str, str] | None = None,
        log: str = "log.txt",
    ) -> int:
        """Start a command; return its process number.

        Args:
            words: of the command.
            folder: where it runs.
            fault: arguments of `arm`.
            set_back: seconds by which its clock is set back; None: it is right.
            variables: environment variables to set.
            log: name of the file that receives its output.
        """
        more = {"fault": fault, "set_back": set_back, "variables": variables or {}}
        return self._start("adaptive-lora", words, folder, log, **more)

    def wait(self, pid: int) -> int:
        """Wait for a command; return its exit code, negative where a signal ended it."""
        return self.end(pid).code

    def end(self, pid: int) -> End:
        """Wait for a command; return how it ended."""
        code, seconds = self._ask({"wait": pid})
        return End(code=code, seconds=seconds)

    def run(
        self, words: list[str], folder: Path, fault: tuple[Any, ...] | None = None, set_back: float | None = None
    ) -> int:
        """Run a command to its end as `start` does; return its exit code."""
        return self.wait(self.start(words, folder, fault, set_back))

    def mlflow(self, words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
        """Run a command of MLflow to its end in a folder and an environment; return its exit code and output."""
        log = folder / "mlflow.txt"
        log.unlink(missing_ok=True)
        code = self.wait(self._start("mlflow", words, folder, log.name, environment=environment))
        return code, log.read_text(encoding="utf-8")

    def python(self, program: str, *words: str, folder: Path) -> str:
        """Run a program in Python to its end, as `python -c` does with words after it; return its output."""
        log = folder / "python.txt"
        log.unlink(missing_ok=True)
        code = self.wait(self._start("python", [program, *words], folder, log.name))
        output = log.read_text(encoding="utf-8")
        assert code == 0, output
        return output

    def _start(self, program: str, words: list[str], folder: Path, log: str, **how: Any) -> int:
        request = {"program": program, "words": words, "folder": str(folder), "log": str(folder / log)}
        return int(self._ask({**request, "fault": None, "set_back": None, "variables": {}, **how}))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


if __name__ == "__main__":
    serve()
