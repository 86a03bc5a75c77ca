"""Trials of a study and how they end, run in the processes that its settings ask for."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path

import torch

from adaptive_lora.config import RetainedSource, StudyConfig
from adaptive_lora.errors import ConfigError
from adaptive_lora.redaction import shown
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.engines.dispatch import Dispatcher, LegOutcome, Pool
from adaptive_lora.runner.engines.here import Outcome, run_here
from adaptive_lora.runner.engines.lost import LostLegs
from adaptive_lora.runner.engines.messages import WorkerSetup
from adaptive_lora.runner.engines.processes import ProcessPool, places_on_cpu, places_on_gpus
from adaptive_lora.runner.engines.worker import versions
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.schedule import Leg, group_size
from adaptive_lora.tracking import StudyRun

_OF_THIS_PROCESS = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME")


def outcomes_of(
    context: StudyContext, study: StudyRun, rounds: Iterator[list[Leg]], progress: StudyProgress
) -> Generator[tuple[Leg, Outcome | LegOutcome], None, None]:
    """Run legs, here or in worker processes, and yield each with its outcome.

    Args:
        context: context of the study.
        study: parent run of the study.
        rounds: legs that can be run now; the next are asked for when there is nothing else to do.
        progress: progress display.
    """
    first = next(rounds, None)
    if first is None:  # nothing to do: no worker is started
        return
    rounds, size, pool = chain([first], rounds), group_size(context.config), pool_for(context, study)
    if pool is None:
        yield from run_here(context, study, rounds, size, progress)
        return
    progress.note(f"[bold]workers[/]   {shown(pool.description)}; each loads base and data first")
    silence, lost = 60 * context.config.worker.worker_minutes, LostLegs(context, study)
    yield from Dispatcher(pool, rounds, progress, size=size, silence=silence, lost=lost).run()


def require_devices(config: StudyConfig) -> None:
    """Check that this machine has the GPUs that worker processes are to run on, before data and base are loaded.

    Raises:
        ConfigError: it does not.
    """
    if config.worker.devices != "one":
        places_on_gpus(config.worker.devices, torch.cuda.device_count())


def pool_for(context: StudyContext, study: StudyRun) -> Pool | None:
    """Return the place where workers run; None: this process runs the trials itself.

    The base leaves this process's GPU, for the workers.

    Raises:
        ConfigError: this machine or cluster does not have what is asked for.
        MissingExtra: Ray is not installed.
    """
    config, settings = context.config, context.config.worker
    if config.engine == "ray":
        from adaptive_lora.runner.engines.ray_cluster import RayPool

        pool: Pool = RayPool(settings, _setup(context, study, settings.cpus_per_trial))
        if pool.uses_gpus and config.train.precision == "auto" and context.runtime.device.type == "cpu":
            pool.close()
            raise ConfigError(
                f"precision auto is {context.runtime.precision} on this machine, which has no GPU as the workers "
                "have; give the precision to train in, for example --precision bf16."
            )
    elif settings.devices != "one":
        places = places_on_gpus(settings.devices, torch.cuda.device_count())
        pool = ProcessPool(_setup(context, study), *places)
    elif settings.workers is not None:
        if context.runtime.device.type != "cpu":
            raise ConfigError(
                "workers: they would share one GPU; use --devices all, or --group-size to train together."
            )
        pool = ProcessPool(_setup(context, study), *places_on_cpu(settings.workers, torch.get_num_threads()))
    else:
        return None
    context.leave_device()
    return pool


def _setup(context: StudyContext, study: StudyRun, threads: int | None = None) -> WorkerSetup:
    """Return what workers need for a study."""
    store = study.store
    return WorkerSetup(
        config=context.config,
        precision=context.runtime.precision,
        study_id=context.study_id,
        run_id=study.run_id,
        tracking_uri=store.uri,
        experiment=store.client.get_experiment(store.experiment_id).name,
        fingerprint=dict(context.fingerprint),
        versions=versions(),
        folder=str(Path.cwd()),
        paths=tuple(str(path) for path in map(Path, _places(context.config)) if path.exists()),
        environment={
            name: value
            for name, value in os.environ.items()
            if name.startswith("MLFLOW_") and name not in _OF_THIS_PROCESS
        },
        threads=threads,
    )


def _places(config: StudyConfig) -> Iterator[str]:
    """Yield the settings that may be a file or folder."""
    data = config.data
    yield from (place for place in (config.model.model, data.data, data.test_data, data.template) if place is not None)
    yield from (RetainedSource.parse(text).settings(data).data for text in config.evaluation.retain_data)
    yield from (task for spec in config.specs for task in spec.profiled_on)
