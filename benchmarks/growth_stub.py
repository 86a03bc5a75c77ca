"""A method that is trained once a process: later trials take its outcome. `growth.py` installs it as a plug-in.

All else of a trial is real: lease, run, settings, adapter files, results, metrics and status reach the tracking store
as after a training. Counts of requests, by name of the client's method, go to a file a process in `GROWTH_COUNTS`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.allocation.request import ProfileSummary, RankRequest
from adaptive_lora.methods.base import RankMethod, TrainedTrial, TrialContext
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class Stub(RankMethod):
    """Uniform rank 1 under many names."""

    name: ClassVar[str] = "stub"
    number: int = option(0, "number that tells stubs apart", limits=Limits(low=0))

    @property
    def rank_label(self) -> str:
        """Return the number."""
        return f"r{self.number}"

    def demand(self, sites: Any, profile: ProfileSummary | None) -> RankRequest:
        """Return rank 1 everywhere."""
        return RankRequest(ranks=tuple(1.0 for _ in sites), budget=uniform_cost(sites, 1))

    def fit(self, context: TrialContext) -> TrainedTrial:
        """Train as LoRA, and keep the outcome of the next trial for all that follow."""
        _install()
        return super().fit(context)


def _install() -> None:
    """Replace the run of a trial and count requests; once a process."""
    from adaptive_lora.runner import trial as module

    original = getattr(module.run_trial, "original", module.run_trial)
    if module.run_trial is not original:
        return
    kept: list[Any] = []
    counts, place = _counted(), Path(os.environ["GROWTH_COUNTS"])

    def run_trial(context: Any, trial: Any, folder: Path, on_step: Any = None, *further: Any) -> Any:
        (place / f"{os.getpid()}.jsonl").open("a").write(json.dumps([time.time(), counts]) + "\n")
        if not kept:
            kept.append(original(context, trial, folder, on_step, *further))
            kept.append(shutil.copytree(folder, place / f"adapter-{os.getpid()}"))
            return kept[0]
        shutil.copytree(kept[1], folder)
        noise = np.random.default_rng([trial.seed, trial.method.options.number]).normal(0, 0.02)
        first = kept[0]
        outcome = dataclasses.replace(
            first,
            folder=folder,
            plan=dataclasses.replace(first.plan, method=trial.method.label),
            train=dataclasses.replace(first.train, order_digest=f"{trial.seed:016x}"),
            test=dataclasses.replace(first.test, nll_E=first.test.nll_E * (1 + noise)),
        )
        further[1](outcome)
        return outcome

    run_trial.original = original  # type: ignore[attr-defined]
    module.run_trial = run_trial


def _counted() -> Counter[str]:
    """Return a counter of the calls of MLflow's client and of uploaded files, from now on."""
    from mlflow import MlflowClient
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    counts: Counter[str] = Counter()
    names = [name for name, value in vars(MlflowClient).items() if callable(value) and not name.startswith("_")]
    inside: list[str] = []
    for kind, methods in (
        (MlflowClient, names),
        (HttpArtifactRepository, ["log_artifact"]),
        (LocalArtifactRepository, ["log_artifact"]),
    ):
        for name in methods:
            setattr(kind, name, _counting(getattr(kind, name), name, counts, inside))
    return counts


def _counting(call: Any, name: str, counts: Counter[str], inside: list[str]) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        if not inside:  # a call within another is the same request
            counts[name] += 1
        inside.append(name)
        try:
            return call(*args, **options)
        finally:
            inside.pop()

    return counted
