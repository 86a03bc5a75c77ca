"""Seconds and peak memory of a profile beside one forward and backward pass with weight gradients over its rows.

    python benchmarks/profile_cost.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data alpaca_short.json

Each measurement has a process of its own, so that peak memory (the greatest resident size) is its own, with the model
loaded. The pass and the training step run as a study runs them: packed rows where the base allows them, `--batch-size`
rows at a time. The pass computes the gradient of the weight of every site, and of nothing else. Seconds are of
processor time, which other programs on the machine disturb less than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

GRADIENT = ("weight_gradient", "gradient_norm", "gradient_variance", "whitened_gradient")
SPECTRUM = "activation_spectrum"
STEP, PASS, TOGETHER, EVERY = "training step", "pass", "gradient metrics", "with activation_spectrum"
NAMES = (STEP, PASS, *GRADIENT, SPECTRUM, TOGETHER, EVERY)


def main() -> None:
    """Measure each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a training step")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--max-memory", help="as in a study, such as 2GB [default: none]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip", nargs="*", default=[], choices=NAMES, help="leave these out")
    parser.add_argument("--only", choices=NAMES, help="measure one alone, in this process")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measured(given)))
        return
    print(f"{'':<26} {'seconds':>8} {'of a pass':>9} {'peak GB':>8}")
    floor = None
    for name in [name for name in NAMES if name not in given.skip]:
        lines = subprocess.run(
            [sys.executable, *sys.argv, "--only", name], check=True, capture_output=True, text=True, env=_limited(given)
        ).stdout.splitlines()
        found = json.loads(lines[-1])
        floor = found["seconds"] if name == PASS else floor
        share = "" if floor is None else f"{found['seconds'] / floor:.2f}"
        print(f"{name:<26} {found['seconds']:8.1f} {share:>9} {found['peak'] / 1e9:8.2f}", flush=True)


def _limited(given: argparse.Namespace) -> dict[str, str]:
    """Return the environment in which every library, and not torch alone, has this number of threads."""
    return {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(given.threads))}


def measured(given: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of one measurement, and this process's peak memory in bytes."""
    import torch

    from adaptive_lora.config import study_from
    from adaptive_lora.methods.importance import profile_importances
    from adaptive_lora.runner.context import StudyContext

    torch.set_num_threads(given.threads)
    settings = {
        "model": given.model, "data": given.data, "template": "compact", "max_examples": given.rows * 2 + 40,
        "max_tokens": given.max_tokens, "batch_size": given.batch_size, "profile_batch_size": 8, "max_steps": 2,
        "profile_batches": given.rows // 8, "precision": "fp32", "methods": "uniform:rank=8", "validations": 1,
        "max_memory": given.max_memory, "validation_share": 0.1, "test_share": 0.2,
    }  # fmt: skip
    context = StudyContext(study_from({k: v for k, v in settings.items() if v is not None}), trains=False)
    runs: dict[str, Callable[[], Any]] = {
        STEP: lambda: _training(context),
        PASS: lambda: _gradients(context, given.batch_size),
        TOGETHER: lambda: profile_importances(context.profile_task(seed=0, fold=0), metrics=GRADIENT, seed=0),
        EVERY: lambda: profile_importances(context.profile_task(seed=0, fold=0), metrics=(*GRADIENT, SPECTRUM), seed=0),
    }
    metrics = (given.only,)
    run = runs.get(given.only) or (
        lambda: profile_importances(context.profile_task(seed=0, fold=0), metrics=metrics, seed=0)
    )
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    return {"seconds": seconds, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _training(context: Any) -> None:
    """Take two steps of uniform LoRA as a trial does."""
    from adaptive_lora.runner.trial_context import TrialOnBase

    (trial, *_) = context.config.trials()
    job = TrialOnBase(context, trial, lambda event: None)
    try:
        trial.method.options.fit(job)
    finally:
        job.release()


def _gradients(context: Any, size: int) -> None:
    """Run the calibration rows forward and backward, with the gradient of every site's weight."""
    from adaptive_lora.data import stacked

    model = context.base.model.eval().requires_grad_(False)
    for site in context.sites:
        model.get_submodule(site.name).weight.requires_grad_(True)
    whole = stacked(context.calibration(0, 0))
    for batch in whole.parts(size):
        with context.task.running(model):
            context.loss(model, batch).backward()


if __name__ == "__main__":
    main()
