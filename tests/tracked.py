"""Helpers of the tests that run studies: a finished one, and what is in a store."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from adaptive_lora.config import StudyConfig
from adaptive_lora.runner.run import StudyOutcome, run_study


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished study and where it is."""

    folder: Path
    config: StudyConfig
    outcome: StudyOutcome
    shown: str
    """What was printed."""

    @property
    def client(self) -> MlflowClient:
        return self.outcome.store.client

    @property
    def runs(self) -> list[Run]:
        return self.client.search_runs([self.outcome.store.experiment_id])

    @property
    def parent(self) -> Run:
        return next(run for run in self.runs if "mlflow.parentRunId" not in run.data.tags)

    @property
    def children(self) -> list[Run]:
        return [run for run in self.runs if "mlflow.parentRunId" in run.data.tags]


def quiet(config: StudyConfig) -> tuple[StudyOutcome, str]:
    """Run a study; return its outcome and what it printed."""
    console = Console(file=io.StringIO(), width=200)
    outcome = run_study(config, console)
    return outcome, console.file.getvalue()  # type: ignore[attr-defined]


def store_in(folder: Path) -> str:
    """Return the URI of the store in a folder."""
    return f"sqlite:///{folder / 'mlflow.db'}"


def runs_in(folder: Path) -> list[Run]:
    """Return all runs of the store in a folder; none before it is there: MLflow would make it."""
    if not (folder / "mlflow.db").exists():
        return []
    client = MlflowClient(store_in(folder))
    return client.search_runs([item.experiment_id for item in client.search_experiments()])


def trials_in(folder: Path) -> list[Run]:
    """Return the runs of trials, oldest first."""
    found = [run for run in runs_in(folder) if "trial_signature" in run.data.tags]
    return sorted(found, key=lambda run: run.info.start_time)


def words_of(options: dict[str, object]) -> list[str]:
    """Return options as words of a command line."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
