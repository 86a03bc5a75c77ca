"""A study that is killed at any moment, again and again, ends as one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from tracked import store_in, words_of
from zygote import Zygote

from adaptive_lora.tracking.leases import LEASE

CHECKPOINTS = "adaptive_lora.training.checkpoint_files"
DELIVERY = "adaptive_lora.tracking.uploader"
Fault = tuple[str, str, int, str]
"""Module, function, call, and whether before or after its work."""
FAULTS: tuple[Fault, ...] = (
    # inside checkpoint writing: tensors there, manifest not; all there but the name; name there
    (CHECKPOINTS, "save_file", 2, "after"),
    (CHECKPOINTS, "_write_files", 2, "after"),
    ("adaptive_lora.training.checkpoint", "write_checkpoint", 2, "after"),
    # inside artifact logging: of the adapter, of a JSON file, between record and delivery
    (DELIVERY, "Uploader._make_model", 1, "after"),
    (DELIVERY, "Uploader._upload", 1, "before"),
    (DELIVERY, "Uploader._upload", 4, "after"),
    ("adaptive_lora.tracking.recorder", "Recorder.model", 1, "after"),
    ("adaptive_lora.tracking.recorder", "Recorder.end", 1, "after"),
    ("adaptive_lora.tracking.journal", "Journal.append", 20, "after"),
    # while the lease is taken, before and after its confirmation; between lease and first trial
    ("adaptive_lora.tracking.leases", "Lease._write", 1, "after"),
    ("adaptive_lora.tracking.leases", "Lease.take", 1, "after"),
    ("adaptive_lora.tracking.study_run", "StudyRun.begin_trial", 1, "after"),
    # inside registration: before a version, with a version and no alias, with both
    ("mlflow", "MlflowClient.create_model_version", 1, "before"),
    ("mlflow", "MlflowClient.create_model_version", 1, "after"),
    ("mlflow", "MlflowClient.set_model_version_tag", 3, "after"),
    ("mlflow", "MlflowClient.set_registered_model_alias", 1, "after"),
)
MOMENTS = 6
"""Random moments at which one study is killed at most."""
MOMENT = "random moment"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder in which the study runs, with an experiment of its own."""

    folder: Path
    words: list[str]
    uri: str
    name: str
    """Of its experiment and its registered model."""

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, self.uri)  # by default the registry of the last study here

    @property
    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name(self.name)
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id]))

    @property
    def trials(self) -> list[Run]:
        return [run for run in self.runs if "trial_signature" in run.data.tags]


def place_in(folder: Path, options: dict[str, object], server: str | None = None, **changes: object) -> Place:
    """Make an empty place, a new folder; the same study in each.

    With the address of a server, the place has an experiment there instead of a store of its own.
    """
    folder.mkdir()
    uri, known_as = server or store_in(folder), f"{folder.name}-there" if server else "adaptive-lora"
    own = {
        "methods": "uniform:rank=2 grow_prune:rank=2,interval=2",
        "max_steps": 6, "epochs": 9, "validations": 3, "dropout": 0.1,
        "checkpoint_steps": 2, "tracking_uri": uri, "experiment": known_as,
        "registered_model": known_as,
    }  # fmt: skip
    words = ["study", *words_of({**options, **own, **changes})]
    return Place(folder=folder, words=words, uri=uri, name=known_as)


@pytest.fixture
def make_place(options: dict[str, object], tmp_path: Path) -> Any:
    """Return a function that makes an empty place of a name."""
    return lambda name, server=None: place_in(tmp_path / name, options, server)


_CLOCK = {"tokens_per_second", "train_seconds", "peak_memory_bytes", "facts"}
"""What a comparison holds of the machine and the moment."""


def numbers(place: Place) -> dict[str, Any]:
    """Return the final comparison without clock, memory, and the names of places."""
    (path,) = (place.folder / "adaptive-lora-out").glob("study-*/comparison.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    found["fronts"] = [front for front in found["fronts"] if "parameters" in front["cost"]]
    found["methods"] = [
        {key: value for key, value in method.items() if key not in _CLOCK} for method in found["methods"]
    ]
    return {key: value for key, value in found.items() if key not in _CLOCK}


def weights(place: Place) -> dict[str, str]:
    """Return the digest of every trial's adapter as the store has it."""
    found = {}
    for run in place.trials:
        model = place.client.get_logged_model(run.data.tags["adapter_model_uri"].split("/")[-1])
        assert str(model.status) == "READY"
        where = get_artifact_repository(model.artifact_location, tracking_uri=place.uri)
        (file,) = Path(where.download_artifacts("")).rglob("adapter_model.safetensors")
        key = f"{run.data.tags['method']} {run.data.tags['seed']}"
        found[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def histories(place: Place) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return (step, value) of every trial's curves in the order of steps."""
    client = place.client
    return {
        f"{run.data.tags['method']} {run.data.tags['seed']}": {
            key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
            for key in ("train/loss", "train/tokens", "validation/loss")
        }
        for run in place.trials
    }


def check_nothing_is_left(place: Place, *, trials: int = 4) -> None:
    """Every run once and finished, one version, one model a trial, no temporary file."""
    runs, client = place.runs, place.client
    assert Counter(run.info.status for run in runs) == {"FINISHED": trials + 1}
    assert len({run.data.tags.get("trial_signature") for run in runs}) == trials + 1
    (version,) = client.search_model_versions(f"name='{place.name}'")
    assert client.get_model_version_by_alias(place.name, "champion").version == version.version
    (experiment,) = {run.info.experiment_id for run in runs}
    models = client.search_logged_models([experiment])
    assert len(models) == trials
    for run in runs:
        history = Counter(
            (key, m.step) for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)
        )
        assert run.data.tags.get("mlflow.parentRunId") is None or max(history.values()) == 1
    output = place.folder / "adaptive-lora-out"
    assert [path.name for path in output.iterdir()] == [next(output.glob("study-*")).name]
    assert not [path for path in place.folder.rglob("*") if ".partial-" in path.name]
    assert not [key for run in runs for key in run.data.tags if key.startswith(LEASE)]


def kill_after(zygote: Zygote, place: Place, seconds: float, set_back: float) -> int:
    """Start the study, kill it after so many seconds of processor time; return its exit code.

    By the clock, a busy machine would have all killed at the start.
    """
    pid = zygote.start(place.words, place.folder, set_back=set_back)
    process = psutil.Process(pid)  # it is there until `wait`, even if it has ended
    while process.status() != psutil.STATUS_ZOMBIE:
        spent = process.cpu_times()
        if spent.user + spent.system >= seconds:
            break
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return zygote.wait(pid)


def ended(place: Place, code: int) -> bool:
    """Return whether a study came to its end; any other end than a kill is a failure."""
    if code not in (0, -signal.SIGKILL):
        log = (place.folder / "log.txt").read_text(encoding="utf-8")
        pytest.fail(f"exit code {code}:\n{log[-4000:]}")
    return code == 0


def check_same(place: Place, reference: Place, *, trials: int = 4) -> None:
    """Compare the numbers of a killed study with those of one that was not."""
    found, expected = numbers(place), numbers(reference)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, f"{key}: {found[key]} against {value}"
    assert weights(place) == weights(reference)
    assert histories(place) == histories(reference)
    check_nothing_is_left(place, trials=trials)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is still to be done to studies."""

    training: list[Fault]
    end: list[Fault]
    moments: int

    @classmethod
    def of(cls, kills: int) -> Plan:
        """Every fault point once, and random moments up to a number of kills."""
        end = [fault for fault in FAULTS if fault[0] == "mlflow"]
        training = [fault for fault in FAULTS if fault not in end]
        return cls(training=training, end=end, moments=kills - len(FAULTS))

    def queue(self, draw: random.Random) -> list[Fault | None]:
        """Return what befalls one study: None is a random moment.

        Faults of registration come last, as nothing of training is left after them.
        """
        moments = [None] * min(self.moments, MOMENTS)
        last = [*self.end, *moments[::2]]
        first = [*self.training, *moments[1::2]]
        return [*draw.sample(first, len(first)), *draw.sample(last, len(last))]

    def without(self, fault: Fault | None) -> Plan:
        """Return what is left after a kill."""
        return Plan(
            training=[one for one in self.training if one != fault],
            end=[one for one in self.end if one != fault],
            moments=self.moments - (fault is None),
        )


def survive(zygote: Zygote, make_place: Any, kills: int, seed: int) -> dict[str, int]:
    """Kill studies until there were so many kills, each fault point among them.

    The clock is set back before each start, and runs backwards.
    """
    reference: Place = make_place("reference")
    whole = zygote.end(zygote.start(reference.words, reference.folder))
    assert whole.code == 0
    check_nothing_is_left(reference)
    draw, plan = random.Random(seed), Plan.of(kills)
    counts = Counter[str]()
    studies = 0
    while counts.total() < kills:
        studies += 1
        assert studies <= kills, f"never reached: {plan}"
        place: Place = make_place(f"study{studies}")
        queue = plan.queue(draw)
        done, hours = False, 0
        while not done:
            hours += 1  # each process believes that it began an hour before the one before it
            moment = bool(queue) and queue[0] is None
            fault = queue.pop(0) if queue else None
            if moment:
                seconds = draw.uniform(0, whole.seconds / 2)
                code = kill_after(zygote, place, seconds, 3600.0 * hours)
            else:
                code = zygote.run(place.words, place.folder, fault, 3600.0 * hours)
            done = ended(place, code)
            if not done:
                counts[f"{fault[1]} {fault[3]}" if fault else MOMENT] += 1
                plan = plan.without(fault)
        check_same(place, reference)
    print(f"{studies} studies, {counts.total()} kills: {dict(counts)}")
    return {"studies": studies, **counts}


def test_a_killed_study_ends_as_if_it_had_not_been(zygote: Zygote, make_place: Any) -> None:
    found = survive(zygote, make_place, kills=20, seed=0)
    assert found[MOMENT] == 20 - len(FAULTS)
    assert set(found) == {"studies", MOMENT, *(f"{n} {when}" for _, n, _, when in FAULTS)}


@pytest.mark.long
def test_a_study_killed_all_over_ends_as_if_it_had_not_been(zygote: Zygote, make_place: Any) -> None:
    found = survive(zygote, make_place, kills=80, seed=1)
    assert found[MOMENT] == 80 - len(FAULTS)
