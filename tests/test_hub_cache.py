"""`--model` and `--data` from a filled cache of the hub, where the hub is switched off or not reached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from click.testing import CliRunner
from conftest import rows
from huggingface_hub import constants
from servers import free_port

from adaptive_lora.cli import main
from adaptive_lora.config import DataConfig, ModelConfig, study_from
from adaptive_lora.data import load_examples
from adaptive_lora.errors import DataError, ModelError
from adaptive_lora.models.base import locate
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.serving.base import _say_cached

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_REACHED = "the hub is not reached ("


@pytest.fixture(scope="module")
def home(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as HF_HOME, with a model and data sets as `hf download` leaves them."""
    folder = tmp_path_factory.mktemp("hf")
    snapshot = {}
    for name in ("models--org--tiny", "datasets--org--rows", "datasets--org--parts", "models--org--bare"):
        repository = folder / "hub" / name
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        snapshot[name] = repository / "snapshots" / COMMIT
        snapshot[name].mkdir(parents=True)
    shutil.copytree(base_folder, snapshot["models--org--tiny"], dirs_exist_ok=True)
    shutil.copy(base_folder / "config.json", snapshot["models--org--bare"])
    (snapshot["datasets--org--rows"] / "train.json").write_text(json.dumps(rows(40)))
    (snapshot["datasets--org--rows"] / "README.md").write_text("# Rows\n")
    (snapshot["datasets--org--parts"] / "train-00000-of-00003.jsonl").write_text(json.dumps(rows(1)[0]))
    return folder


@pytest.fixture(params=["switched off", "not reached"])
def away(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """This process with that cache and no hub. Its variables are read when the packages are imported."""
    off = request.param == "switched off"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", off)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", off)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    _say_cached.cache_clear()
    return str(request.param)


def test_a_plan_and_the_reading_of_a_study(away: str, caplog: pytest.LogCaptureFixture) -> None:
    planned = CliRunner().invoke(main, ["plan", "--model", "org/tiny", "--method", "uniform", "--json"])
    assert planned.exit_code == 0, planned.output
    context = StudyContext(study_from({"model": "org/tiny", "data": "org/rows", "template": "compact"}))
    assert (context.base.reference.source, context.base.reference.revision) == ("hub", COMMIT)
    lines = "\n".join(context.data_lines())
    assert "org/rows: 40 rows" in lines
    assert f"read from the hub's cache, commit {COMMIT[:12]}" in lines
    said = [
        record.message for record in caplog.records if "base org/tiny is read from the hub's cache" in record.message
    ]
    if away == "not reached":
        (line,) = said  # once, however often the base is opened
        assert NOT_REACHED in line
        assert NOT_REACHED in lines
    else:
        assert said == []
        assert "HF_HUB_OFFLINE is set" in lines


def test_the_rows_are_those_of_the_files(away: str, home: Path) -> None:
    cached = load_examples(DataConfig(data="org/rows"))
    folder = home / "hub" / "datasets--org--rows" / "snapshots" / COMMIT
    assert cached.digest == load_examples(DataConfig(data=str(folder))).digest
    assert cached.digest == load_examples(DataConfig(data=str(folder / "train.json"))).digest


def test_what_the_cache_lacks_is_named(away: str) -> None:
    with pytest.raises(DataError, match=r"the hub's cache has 1 of the 3 files train\.jsonl; required all"):
        load_examples(DataConfig(data="org/parts"))
    with pytest.raises(ModelError, match="have no weights"):
        locate(ModelConfig(model="org/bare"))
    assert locate(ModelConfig(model="org/bare"), weights=False)[0] == "hub"
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        locate(ModelConfig(model="org/unknown"))


@pytest.mark.long
@pytest.mark.parametrize("off", [True, False])
def test_a_study_from_a_shell(off: bool, home: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    environment |= {"HF_HUB_OFFLINE": "1"} if off else {}
    words = [sys.executable, "-m", "adaptive_lora.cli", "study", "--model", "org/tiny", "--data", "org/rows"]
    words += ["--methods", "uniform:rank=2", "--seeds", "0", "--max-steps", "1", "--template", "compact"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (NOT_REACHED in done.stdout + done.stderr) is not off
