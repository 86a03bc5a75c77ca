"""Every entry point through `mlflow run`, from a folder and from git."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import rows
from mlflow import MlflowClient
from mlflow.entities import Run
from zygote import Zygote

from adaptive_lora.cli import main

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = {"main": "study", "profile": "profile", "train": "train", "evaluate": "evaluate", "compare": "compare"}
"""Entry point of MLproject -> command of the command line."""


def options_of(command: str) -> set[str]:
    """Return a command's options as `-P` names them."""
    return {
        name.removeprefix("--").replace("-", "_")
        for parameter in main.commands[command].params
        for name in parameter.opts
    }


def test_entry_points_have_no_defaults_of_their_own() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
    assert set(project["entry_points"]) == set(ENTRY_POINTS)
    for name, entry in project["entry_points"].items():
        assert set(entry) == {"command"}, f"{name}: parameters have their defaults in config.py"
        words = entry["command"].split()
        assert words[0] == "python"
        assert len(words) == 2
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        words = "sys.argv[1:]" if name == "compare" else "_project.arguments()"
        assert f'main(["{ENTRY_POINTS[name]}", *{words}])' in script
    environment = yaml.safe_load((ROOT / project["conda_env"]).read_text(encoding="utf-8"))
    assert environment["name"] == project["name"] == "adaptive-lora"


@pytest.mark.parametrize("name", ["MLproject", "README.md"])
def test_documented_parameters_are_options(name: str) -> None:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"no {name} yet")
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"mlflow run [^\n`]*", text)
    assert commands
    for command in commands:
        entry = re.search(r"-e (\w+)", command)
        known = options_of(ENTRY_POINTS[entry.group(1) if entry else "main"])
        assert set(re.findall(r"-P (\w+)=", command)) <= known, command


@dataclass(frozen=True, kw_only=True)
class Project:
    """A copy of this repository, where it is served by git, and a store to run it in."""

    folder: Path
    commit: str
    address: str
    work: Path
    options: dict[str, str]
    zygote: Zygote

    @property
    def store(self) -> str:
        return f"sqlite:///{self.work / 'mlflow.db'}"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.store, self.store)  # studies in this process set a registry

    @property
    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        experiments = [item.experiment_id for item in self.client.search_experiments()]
        return sorted(self.client.search_runs(experiments), key=lambda run: int(run.info.start_time))

    def run(self, entry: str, options: dict[str, str], *, git: bool = False, fails: bool = False) -> tuple[Run, str]:
        """Run an entry point; return the run that `mlflow run` made, and the output."""
        before = {run.info.run_id for run in self.runs}
        source = [self.address, "--version", self.commit] if git else [str(self.folder)]
        words = ["run", *source, "-e", entry, "--env-manager", "local", "--experiment-name", "projects"]
        for key, value in options.items():
            words += ["-P", f"{key}={value}"]
        code, output = self.zygote.mlflow(words, self.work, environment(MLFLOW_TRACKING_URI=self.store))
        assert (code != 0) == fails, output
        assert "Changing param values" not in output
        made = [
            run for run in self.runs if run.info.run_id not in before and "mlflow.project.entryPoint" in run.data.tags
        ]
        assert len(made) == 1, output
        return made[0], output


def environment(**extra: str) -> dict[str, str]:
    """Return an environment whose `python` is this one, without tracking from outside."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **extra}


def git(folder: Path, *words: str) -> str:
    """Run git in a folder, as nobody in particular; return its output."""
    names = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    result = subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """This working tree as a committed copy behind a git daemon: (folder, commit, address)."""
    above = tmp_path_factory.mktemp("git")
    folder = above / "adaptive-lora"
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "Working tree")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = ["--export-all", "--reuseaddr", "--listen=127.0.0.1", f"--port={port}"]
    daemon = subprocess.Popen(["git", "daemon", *words, f"--base-path={above}", str(above)], start_new_session=True)
    try:
        _wait_for(port)
        commit = git(folder, "rev-parse", "HEAD").strip()
        yield folder, commit, f"git://127.0.0.1:{port}/adaptive-lora"
    finally:
        os.killpg(daemon.pid, 15)  # `git daemon` is a child of `git`
        daemon.wait(timeout=20)


def _wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("git daemon does not answer")


@pytest.fixture(scope="module")
def project(
    served: tuple[Path, str, str],
    base_folder: Path,
    empty_store: Path,
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    """The project with an empty store and options of a study that runs in seconds."""
    work = tmp_path_factory.mktemp("work")
    shutil.copy(empty_store, work / "mlflow.db")
    (work / "my rows.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    options = {
        "model": str(base_folder),
        "data": str(work / "my rows.json"),
        "output": str(work / "out"),
        "template": "compact",
        "max_tokens": "120",
        "lr": "1e-2",
        "weight_decay": "1e-4",
        "max_steps": "2",
        "batch_size": "4",
        "validations": "1",
        "generate": "off",
    }
    folder, commit, address = served
    return Project(folder=folder, commit=commit, address=address, work=work, options=options, zygote=zygote)


@pytest.fixture(scope="module")
def studied(project: Project) -> tuple[Run, str]:
    """The run of `main` from the folder: one method, one seed."""
    options = {**project.options, "methods": "uniform:rank=2", "seeds": "0"}
    return project.run("main", options)


def children_of(project: Project, run: Run) -> list[Run]:
    """Return the runs whose parent is this one."""
    return [other for other in project.runs if other.data.tags.get("mlflow.parentRunId") == run.info.run_id]


def test_main_makes_its_own_run_the_study(project: Project, studied: tuple[Run, str]) -> None:
    run, output = studied
    assert run.info.status == "FINISHED"
    assert run.data.tags["adaptive_lora.kind"] == "study"
    assert run.data.params["lr"] == "1e-2"  # as it was typed, logged by `mlflow run`
    (trial,) = children_of(project, run)
    assert trial.info.status == "FINISHED"
    assert trial.data.params["trial.lr"] == "0.01"
    assert trial.data.params["cfg.weight_decay"] == "0.0001"
    assert trial.info.experiment_id == run.info.experiment_id
    assert [item.name for item in project.client.search_experiments()] == ["projects", "Default"]
    assert "models:/adaptive-lora@champion is version 1" in output
    assert list((project.work / "out").glob("*/report.html"))
    assert not (project.folder / "mlflow.db").exists()


def test_train_is_the_run_and_joins_the_study(project: Project, studied: tuple[Run, str]) -> None:
    parent, _ = studied
    adapter = project.work / "adapter"
    options = {**project.options, "method": "uniform:rank=1", "adapter": str(adapter)}
    run, _ = project.run("train", options)
    assert run.info.status == "FINISHED"
    assert run.data.tags["adaptive_lora.kind"] == "trial"
    assert run.data.tags["method"] == "uniform-r1"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (adapter / "adapter_model.safetensors").is_file()


def test_profile_logs_to_its_run(project: Project) -> None:
    shared = {key: value for key, value in project.options.items() if key != "lr"}
    run, _ = project.run("profile", {**shared, "profile_batches": "2", "seeds": "0"})
    assert run.info.status == "FINISHED"
    assert run.data.params["profile.metric"] == "weight_gradient"
    assert "profile/stability" in run.data.metrics
    written = project.client.list_artifacts(run.info.run_id)
    assert "profile_weight_gradient_seed0.json" in {item.path for item in written}


def test_evaluate_scores_the_champion(project: Project, studied: tuple[Run, str]) -> None:
    keys = ("data", "template", "max_tokens", "generate")
    options = {key: project.options[key] for key in keys}
    run, _ = project.run("evaluate", {**options, "adapter": "models:/adaptive-lora@champion"})
    assert run.info.status == "FINISHED"
    champion = project.client.get_model_version_by_alias("adaptive-lora", "champion")
    trial = project.client.get_run(champion.run_id)
    assert run.data.metrics["test/loss"] == trial.data.metrics["test/loss"]


def test_compare_judges_the_study_again(project: Project, studied: tuple[Run, str]) -> None:
    parent, _ = studied
    study_id = parent.data.tags["study_id"]
    run, output = project.run("compare", {"study_id": study_id, "output": str(project.work / "again")})
    assert run.info.status == "FINISHED"
    assert (project.work / "again" / study_id / "report.html").is_file()
    assert len(project.client.search_model_versions("name='adaptive-lora'")) == 1
    assert "models:/adaptive-lora@champion is version 1" in output


def test_main_and_train_from_git(project: Project, studied: tuple[Run, str]) -> None:
    earlier, _ = studied
    options = {**project.options, "methods": "uniform:rank=2", "seeds": "0 1"}
    run, output = project.run("main", options, git=True)
    assert run.data.tags["mlflow.source.git.commit"] == project.commit
    assert "1 trial is finished already; 1 to run" in output
    seeds = {trial.data.tags["seed"] for trial in children_of(project, run)}
    assert seeds == {"0", "1"}
    # One parent a study: the new run took over the earlier one's trials.
    superseded = project.client.get_run(earlier.info.run_id).data.tags
    assert superseded["superseded_by"] == run.info.run_id
    assert children_of(project, earlier) == []

    trained, _ = project.run("train", {**project.options, "lr": "1e-4", "seed": "1"}, git=True)
    assert trained.info.status == "FINISHED"
    assert trained.data.params["lr"] == "1e-4"
    assert trained.data.params["trial.lr"] == "0.0001"
    assert trained.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert trained.data.tags["mlflow.source.git.commit"] == project.commit


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"sedes": "0"}, "No such option"), ({"data": "no-such-file.json"}, "data file no-such-file.json does not exist")],
)
def test_a_failing_entry_point_fails_the_run(project: Project, changes: dict[str, str], words: str) -> None:
    run, output = project.run("main", {**project.options, **changes}, fails=True)
    assert run.info.status == "FAILED"
    assert words in output
    assert "study_id" not in run.data.tags
