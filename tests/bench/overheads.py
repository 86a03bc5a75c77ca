"""What stands beside the steps of a study: `python tests/bench/overheads.py [--json]`.

Embedded base and tasks: uniform rank 8, batch 8, two trials in one process, in float32. Shares of
the time of training steps, measured inside a real study: making batches (loader), logging of steps
to a SQLite store (as the trial waits for it), and the seconds from one trial's begin to its first
step once the base is loaded (second trial). On larger bases steps are longer and shares smaller.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class Clock:
    """Adds up the time of calls."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, clocked."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self.calls += 1

        return clocked


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        found = measure()
        os.chdir("/")
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:<28} {value:.4g}")


def measure() -> dict[str, float]:
    """Run a study of two trials with clocks on its parts."""
    from rich.console import Console

    from adaptive_lora.config import study_from
    from adaptive_lora.runner import run as study
    from adaptive_lora.runner import trial as study_trial
    from adaptive_lora.runner.run import run_study
    from adaptive_lora.training.trainer import Trainer

    loader, logging, steps = Clock(), Clock(), Clock()
    begins: list[float] = []
    firsts: list[float] = []
    run_tracked, learn = study_trial.run_tracked, Trainer.learn

    def begun(*args: Any, **kwargs: Any) -> Any:
        begins.append(time.perf_counter())
        return run_tracked(*args, **kwargs)

    def first(trainer: Trainer, window: Any) -> float:
        if not trainer.losses:
            firsts.append(time.perf_counter())
        return learn(trainer, window)

    study.run_tracked = begun  # type: ignore[attr-defined]
    study_trial.log_step = logging.around(study_trial.log_step)  # type: ignore[attr-defined]
    Trainer.next_window = loader.around(Trainer.next_window)  # type: ignore[method-assign]
    Trainer.learn = steps.around(first)  # type: ignore[method-assign]
    applied = steps.around(Trainer.apply)
    Trainer.apply = applied  # type: ignore[method-assign]
    config = study_from(
        {
            "precision": "fp32", "methods": "uniform:rank=8", "seeds": "0 1", "lr": "6e-3",
            "max_steps": 60, "max_examples": 300, "validations": 2, "generate": "off",
        }
    )  # fmt: skip
    run_study(config, Console(file=io.StringIO()))
    return {
        "step_seconds": steps.seconds / logging.calls,
        "loader_share": loader.seconds / steps.seconds,
        "logging_share": logging.seconds / steps.seconds,
        "first_trial_start_seconds": firsts[0] - begins[0],
        "second_trial_start_seconds": firsts[1] - begins[1],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
