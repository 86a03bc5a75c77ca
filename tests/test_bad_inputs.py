"""Every bad input has one clear message and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import ADAPTERS, CASES, Bad
from bad_inputs.plans import IN_A_STORE
from click.testing import CliRunner, Result
from tracked import Finished

from adaptive_lora.cli import main
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder

GOOD = [{"instruction": f"Say {n}", "input": "", "output": "hi"} for n in range(40)]


def tree(folder: Path) -> dict[str, str]:
    """Return every path below a folder with a digest of its content."""
    return {
        os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace"): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in folder.rglob("*")
        if path.suffix not in (".db-shm", ".db-wal")
    }


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def require_refusal(result: Result, says: str) -> None:
    """Check that a command ended with one message for people, and nothing else."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert len(re.findall("^Error: ", result.output, re.MULTILINE)) == 1
    assert says in " ".join(result.stderr.split()) or says in result.stderr
    assert "secret-word" not in result.output
    assert "\x1b" not in result.output
    assert len(result.stderr) < 3_000


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not here is not looked for on the hub."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(GOOD), encoding="utf-8")
    for name, content in case.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = tree(tmp_path)
    words = [str(base_folder) if word == "BASE" else word for word in case.words]
    require_refusal(invoke(*words), case.says)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def adapter(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of an adapter that a study made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.folder)
        uniform = next(run for run in finished.children if run.data.tags["method"] == "uniform-r2")
        source = adapter_folder(uniform.data.tags[MODEL_TAG])
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("adapter") / "good"))


def test_the_adapter_is_good(adapter: Path, tmp_path: Path) -> None:
    for form in ("--merged", "--uniform"):
        result = invoke("export", form, adapter, tmp_path / form)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_adapter(name: str, adapter: Path, tmp_path: Path) -> None:
    change, says = ADAPTERS[name]
    shutil.copytree(adapter, tmp_path / "adapter")
    change(tmp_path / "adapter")
    before = tree(tmp_path)
    form = "--uniform" if name == "a damaged plan" else "--merged"
    require_refusal(invoke("export", form, "adapter", "out"), says)
    assert tree(tmp_path) == before


@pytest.fixture
def store(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a finished study, which has to stay as it is."""
    monkeypatch.chdir(finished.folder)
    (finished.folder / "good.json").write_text(json.dumps(GOOD), encoding="utf-8")
    before = tree(finished.folder)
    yield finished.folder
    assert tree(finished.folder) == before


@pytest.mark.parametrize("words", IN_A_STORE.values(), ids=IN_A_STORE)
def test_bad_request_to_a_store(words: tuple[str, ...], store: Path) -> None:
    require_refusal(invoke(*words), "")
