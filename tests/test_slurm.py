"""Slurm's scripts with stand-ins for its commands that start real processes here; the manifest for Kubernetes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from rayjob_schema import MANIFEST, SCHEMA
from test_kill import Place, check_same, make_place
from test_project import ROOT
from zygote import Zygote

from adaptive_lora.cli import main

__all__ = ["make_place"]  # fixtures

OVER_NODES = ROOT / "entrypoints" / "slurm" / "study_over_nodes.sbatch"
ARRAY = ROOT / "entrypoints" / "slurm" / "command_array.sbatch"
SCRIPTS = (OVER_NODES, ARRAY)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of the stand-ins."""

    folder: Path
    environment: dict[str, str]

    def submit(self, script: Path, *words: str, **options: object) -> subprocess.Popen[bytes]:
        """Start a script as `sbatch` does, but wait for its end."""
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return subprocess.Popen(["sbatch", *given, str(script), *words], cwd=self.folder.parent, env=self.environment)

    def stop(self, restart: int = 0) -> None:
        """Send the batch shell alone SIGTERM, as `--signal=B:TERM@120` does."""
        os.kill(int((self.folder / f"batch{restart}").read_text()), signal.SIGTERM)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")

    @property
    def starts(self) -> int:
        return len(list(self.folder.glob("batch*")))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job whose commands are the stand-ins."""
    commands, folder = tmp_path / "bin", tmp_path / "job"
    commands.mkdir()
    folder.mkdir()
    (folder / "state").write_text("RUNNING", encoding="utf-8")
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        text = f"#!{sys.executable}\nfrom slurm_commands import main\n\nmain()\n"
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "STANDIN_JOB": str(folder),
        "STANDIN_ID": str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        "OBJECT_STORE_BYTES": "100000000",
    }
    return Job(folder=folder, environment=environment)


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], job: Job) -> None:
    """Wait for a condition; fail with the log if the process ends before."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the job has ended:\n{job.log}")
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_ask_slurm_for_a_signal_and_a_restart(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    directives = re.findall(r"(?m)^#SBATCH (.*)$", text)
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append"} <= set(directives)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", line) for line in directives)


def test_options_in_scripts_and_manifest_exist() -> None:
    known = {option for param in main.commands["study"].params for option in param.opts}
    script = re.findall(r"adaptive-lora study (--.*?) \"\$@\"", OVER_NODES.read_text(encoding="utf-8"))
    entrypoint = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["spec"]["entrypoint"]
    for text in (*script, entrypoint):
        words = re.findall(r"(?<!\S)--[a-z-]+", text)
        assert {"--engine", "--ray-address", "--wait"} <= set(words) <= known


COMMAND = """
import os, signal, sys, time
def stop(number, frame):
    open("saved", "w").close()
    sys.exit({code})
if os.path.exists("saved"):
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open("started", "w").close()
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("state", "code", "starts"), [("RUNNING", 143, 2), ("COMPLETING", 143, 1), ("RUNNING", 2, 1)])
def test_a_command_is_requeued_after_a_stop_but_not_after_scancel_or_a_failure(
    job: Job, state: str, code: int, starts: int
) -> None:
    folder = job.folder.parent
    (folder / "command.py").write_text(COMMAND.format(code=code), encoding="utf-8")
    (folder / "commands.txt").write_text("false\npython 'command.py'\n", encoding="utf-8")
    process = job.submit(ARRAY, "commands.txt", array=2)
    until((folder / "started").exists, process, job)
    (job.folder / "state").write_text(state, encoding="utf-8")
    job.stop()
    assert process.wait() == (0 if starts == 2 else code), job.log
    assert (folder / "saved").exists()
    assert job.starts == starts
    assert job.submit(ARRAY, "commands.txt", array=3).wait() == 2
    assert "commands.txt has no line 3" in job.log


@pytest.mark.long
def test_a_study_over_two_nodes_survives_its_time_limit(zygote: Zygote, make_place: Any, job: Job) -> None:
    """Real Ray nodes: SIGTERM while trials train, a requeue, then every trial once with the numbers of one process."""
    more = ["--max-steps=300", "--epochs=900", "--checkpoint-steps=100000"]
    reference, place = make_place("alone"), make_place("nodes")
    assert zygote.run([*reference.words, *more], reference.folder) == 0
    words = [*place.words[1:], *more, f"--output={place.folder / 'adaptive-lora-out'}", "--gpus-per-trial=0"]
    process = job.submit(OVER_NODES, *words, cpus_per_task=1)
    until(lambda: trained(place), process, job)
    job.stop()
    assert process.wait() == 0, job.log
    assert job.starts == 2
    assert job.log.count("Ray cluster of 2 nodes") == 2
    assert "Interrupted; the same command continues where it stopped." in job.log
    check_same(place, reference)
    session = f"/tmp/ray-{job.environment['STANDIN_ID']}"
    assert not Path(session).exists()
    assert not [one.pid for one in psutil.process_iter(["cmdline"]) if session in " ".join(one.info["cmdline"] or [])]


@pytest.mark.long
def test_a_study_of_an_array_survives_its_time_limit(zygote: Zygote, make_place: Any, job: Job) -> None:
    more = ["--max-steps=300", "--epochs=900", "--checkpoint-steps=100000"]
    reference, place = make_place("alone"), make_place("array")
    assert zygote.run([*reference.words, *more], reference.folder) == 0
    words = [*place.words, *more, f"--output={place.folder / 'adaptive-lora-out'}"]
    (job.folder.parent / "commands.txt").write_text(f"adaptive-lora {' '.join(map(repr, words))}\n", encoding="utf-8")
    process = job.submit(ARRAY, "commands.txt", array=1)
    until(lambda: trained(place), process, job)
    job.stop()
    assert process.wait() == 0, job.log
    assert job.starts == 2
    check_same(place, reference)


def trained(place: Place) -> bool:
    """Return whether a trial's training has begun and not all have."""
    journals = place.folder.glob("adaptive-lora-out/spool/*/journal.jsonl")
    return any("train/loss" in path.read_text(encoding="utf-8") for path in journals)


def test_the_manifest_keeps_to_kuberays_schema() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    check = jsonschema.Draft202012Validator(schema)
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    check.validate(manifest)
    cluster = manifest["spec"]["rayClusterSpec"]
    (pin,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert Requirement(pin).specifier.contains(cluster["rayVersion"])
    wrong: list[tuple[dict[str, Any], str, Any]] = [
        (manifest["spec"], "entryPoint", "adaptive-lora"),
        (cluster["authOptions"], "mode", "tokens"),
        (cluster["headGroupSpec"]["rayStartParams"], "num-gpus", 0),
        (cluster["workerGroupSpecs"][0], "replicas", "3"),
    ]
    for where, key, value in wrong:
        before = dict(where)
        where[key] = value
        assert not check.is_valid(manifest), key
        where.clear()
        where.update(before)
    check.validate(manifest)
