"""Cost of initial weights in training steps: `python tests/bench/start_cost.py [--model MODEL] [--steps 20]`.

Rank 8 on the embedded tasks, batch 8, float32, one thread. In one process: processor seconds of the factors of each
start, on a base that is loaded already, and of a step of plain LoRA on it, the mean of `--steps` steps in the
second of two trainings. Starts that are measured (corda, lora_ga, eva) take the default calibration: 4 batches of 8
examples.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

STARTS = ("orthogonal", "olora", "pissa", "lora_ga", "corda", "eva", "loftq")
PLAIN = "uniform:rank=8"


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="base model [default: embedded]")
    parser.add_argument("--steps", type=int, default=20, help="training steps to average over [default: 20]")
    parser.add_argument("--max-tokens", type=int, default=128, help="maximum length of an example [default: 128]")
    parser.add_argument("--starts", nargs="*", default=STARTS, help="instead of all")
    given = parser.parse_args()
    import torch

    from adaptive_lora.config import study_from
    from adaptive_lora.runner.context import StudyContext

    torch.set_num_threads(1)
    methods = [PLAIN, *(f"{PLAIN},init={one}{',base=nf4' if one == 'loftq' else ''}" for one in given.starts)]
    settings = {
        "model": given.model, "methods": methods, "precision": "fp32", "batch_size": 8, "max_examples": 900,
        "max_tokens": given.max_tokens, "max_steps": given.steps, "validations": 1, "lr": "1e-3", "generate": "off",
        "seeds": "0", "epochs": 9,
    }  # fmt: skip
    context = StudyContext(study_from(settings))
    trials = list(context.config.trials())
    step = of_a_step(context, trials[0], given.steps)
    print(f"{given.model}: a training step takes {step:.3g} s of processor time")
    print(f"{'start':<12} {'seconds':>8} {'steps':>7}")
    for trial in trials[1:]:
        seconds = of_a_start(context, trial)
        print(f"{trial.method.init:<12} {seconds:8.2f} {seconds / step:7.1f}")


def of_a_step(context: Any, trial: Any, steps: int) -> float:
    """Return the processor seconds of a training step of plain LoRA, after one training that is not counted."""
    from adaptive_lora.runner.trial_context import TrialOnBase

    for _ in range(2):
        job = TrialOnBase(context, trial, lambda event: None)
        adapted = job.attach(job.plan)
        started = time.process_time()
        job.train(adapted)
        seconds = time.process_time() - started
        job.release()
    return seconds / steps


def of_a_start(context: Any, trial: Any) -> float:
    """Return the processor seconds of the factors of a start, on a base that is loaded already."""
    from adaptive_lora.methods.start import begin, initial_factors
    from adaptive_lora.runner.trial_context import TrialOnBase

    job = TrialOnBase(context, trial, lambda event: None)
    started = time.process_time()
    pairs = initial_factors(job)
    seconds = time.process_time() - started
    adapted = job.attach(job.plan)
    started = time.process_time()
    begin(adapted, job.plan, pairs)
    seconds += time.process_time() - started
    job.release()
    return seconds


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
