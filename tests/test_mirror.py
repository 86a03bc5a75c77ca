"""Checkpoints copied to a storage of fsspec: another machine continues, whatever the storage does."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations
from test_checkpoints import EVERY_STEP, NEVER, SETTINGS, numbers, signal_at_forward

from adaptive_lora.config.storage import Storage
from adaptive_lora.errors import ConfigError
from adaptive_lora.interruption import Interrupted, interruptible
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import remove_checkpoints, run_trial, trial_checkpoints
from adaptive_lora.training import TrialCheckpoints
from adaptive_lora.training.mirror import CheckpointMirror

MODEL = torch.nn.Linear(2, 2)
SECRET = "user:planted-secret-in-uri"


class Unreliable(MemoryFileSystem):
    """A storage of this process that fails in the calls named, as another library would."""

    protocol = "unreliable"
    store: dict[str, Any] = {}  # noqa: RUF012 - that of the base class belongs to memory://
    pseudo_dirs = [""]  # noqa: RUF012
    failing: set[str] = set()  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("unreliable://").strip("/")
        return f"/{path}" if path else ""

    def _called(self, name: str, path: object) -> None:
        self.calls.append(name)
        if name in self.failing or f"{name} {str(path).rpartition('/')[2]}" in self.failing:
            raise RuntimeError(f"403 for {SECRET}@bucket{path}")

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._called("put_file", rpath)
        super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        self._called("get_file", rpath)
        super().get_file(rpath, lpath, *args, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._called("find", path)
        return super().find(path, *args, **kwargs)

    def ls(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._called("ls", path)
        return super().ls(path, *args, **kwargs)

    def rm(self, path: str, *args: Any, **kwargs: Any) -> None:
        self._called("rm", path)
        super().rm(path, *args, **kwargs)


@pytest.fixture
def unreliable() -> Iterator[type[Unreliable]]:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    for kept in (Unreliable.store, Unreliable.failing, Unreliable.calls):
        kept.clear()
    yield Unreliable
    _registry.pop("unreliable")


def machine(tmp_path: Path, name: str, url: str) -> TrialCheckpoints:
    """Return a trial's checkpoints on a machine with a disk of its own."""
    return TrialCheckpoints(tmp_path / name / "trial", NEVER, CheckpointMirror(url, "trial"))


def snapshot(step: int) -> dict[str, Any]:
    """Return the least that a snapshot holds."""
    return {"losses": [0.5] * step, "step_tokens": [1] * step, "validation": [], "reported": step,
            "weights": torch.arange(3.0) + step}  # fmt: skip


def write(checkpoints: TrialCheckpoints, *steps: int) -> None:
    training = checkpoints.of(1, MODEL)
    for step in steps:
        training.write(step, lambda step=step: snapshot(step))  # type: ignore[misc]


def newest(checkpoints: TrialCheckpoints) -> int | None:
    """Return the step that training continues at."""
    found = checkpoints.of(1, MODEL).latest()
    assert found is None or found["weights"].equal(torch.arange(3.0) + len(found["losses"]))
    return None if found is None else len(found["losses"])


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_another_machine_goes_on_bit_for_bit(
    make_bench: Callable[..., StudyContext], tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "shared"
    url = place.as_uri() if kind == "file" else f"memory://{tmp_path.name}"
    context = make_bench(methods="uniform:rank=2", **SETTINGS)
    (trial,) = context.config.trials()
    expected = numbers(run_trial(context, trial, tmp_path / "whole"))
    with signal_at_forward(context, 9, signal.SIGTERM), interruptible(), pytest.raises(Interrupted):
        run_trial(context, trial, tmp_path / "cut", checkpoints=machine(tmp_path, "first", url))
    second = machine(tmp_path, "second", url)
    steps: list[object] = []
    outcome = run_trial(context, trial, tmp_path / "again", steps.append, second)
    assert numbers(outcome) == expected
    assert second.seconds_before > 0
    assert second.mirror is not None
    assert len(second.mirror.names("training1-")) == 2
    second.remove()
    assert second.mirror.trials() == set()
    assert not (tmp_path / "second").exists()
    if kind == "file":
        assert list(place.rglob("*")) == []


def test_the_last_two_are_kept_in_the_storage_too(tmp_path: Path, unreliable: type[Unreliable]) -> None:
    url = "unreliable://bucket/folder"
    write(machine(tmp_path, "first", url), 1, 2, 3)
    second = machine(tmp_path, "second", url)
    assert newest(second) == 3
    write(second, 4)
    assert second.mirror is not None
    assert second.mirror.names("training1-") == {"training1-step000000003", "training1-step000000004"}
    assert all(path.startswith("/bucket/folder/trial/") for path in unreliable.store)


def test_the_newest_of_both_places_counts(tmp_path: Path, unreliable: type[Unreliable]) -> None:
    """The storage was away for a while, or another machine went further meanwhile."""
    url = "unreliable://bucket"
    first = machine(tmp_path, "first", url)
    write(first, 1)
    unreliable.failing.add("put_file")
    write(first, 2)
    unreliable.failing.clear()
    assert newest(first) == 2
    second = machine(tmp_path, "second", url)
    assert newest(second) == 1
    write(second, 3)
    assert newest(first) == 3


@pytest.mark.parametrize("damaged", ["manifest.json", "state.json", "tensors.safetensors"])
def test_a_damaged_copy_falls_back_and_is_removed(
    tmp_path: Path, unreliable: type[Unreliable], caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    url = "unreliable://bucket"
    write(machine(tmp_path, "first", url), 1, 2)
    path = f"/bucket/trial/training1-step000000002/{damaged}"
    content = bytearray(Unreliable().cat_file(path))
    content[len(content) // 2] ^= 255
    Unreliable().pipe_file(path, bytes(content))
    second = machine(tmp_path, "second", url)
    assert newest(second) == 1
    assert "is corrupt and ignored" in caplog.text
    assert second.mirror is not None
    assert second.mirror.names("training1-") == {"training1-step000000001"}


def test_a_damaged_one_on_disk_is_fetched_again(tmp_path: Path, unreliable: type[Unreliable]) -> None:
    first = machine(tmp_path, "first", "unreliable://bucket")
    write(first, 1, 2)
    (first.folder / "training1-step000000002" / "tensors.safetensors").write_bytes(b"")
    assert newest(first) == 2
    assert unreliable.calls.count("get_file") == 3


def test_an_upload_that_was_cut_off_is_none(tmp_path: Path, unreliable: type[Unreliable]) -> None:
    first = machine(tmp_path, "first", "unreliable://bucket")
    write(first, 1)
    unreliable.failing.add("put_file manifest.json")
    write(first, 2)
    assert any("step000000002/tensors" in path for path in unreliable.store)
    second = machine(tmp_path, "second", "unreliable://bucket")
    assert newest(second) == 1
    second.remove()
    assert unreliable.store == {}


@pytest.mark.parametrize("failing", ["put_file", "get_file", "find", "rm"])
def test_a_storage_that_fails_costs_a_warning_without_its_password(
    tmp_path: Path, unreliable: type[Unreliable], caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    url = f"unreliable://{SECRET}@bucket"
    write(machine(tmp_path, "before", url), 1)
    unreliable.failing.add(failing)
    checkpoints = TrialCheckpoints(tmp_path / "disk" / "trial", EVERY_STEP, CheckpointMirror(url, "trial"))
    newest(checkpoints)
    write(checkpoints, 2, 3, 4)
    assert newest(checkpoints) == 4
    checkpoints.remove()
    assert not checkpoints.folder.exists()
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings
    assert all("403 for ***@bucket" in text for text in warnings)
    assert SECRET not in caplog.text


def test_a_finished_study_asks_the_storage_once(
    make_bench: Callable[..., StudyContext], tmp_path: Path, unreliable: type[Unreliable]
) -> None:
    settings = {"checkpoints": "unreliable://bucket/runs", "output": str(tmp_path / "out")}
    context = make_bench(methods="uniform:rank=2 uniform:rank=3", seeds="0,1", **settings)
    trials = list(context.config.trials())
    left = trial_checkpoints(context, trials[1])
    assert left.folder.is_relative_to(tmp_path / "out" / "checkpoints")
    write(left, 1)
    Unreliable().pipe_file("/bucket/runs/of another study/file", b"kept")
    unreliable.calls.clear()
    remove_checkpoints(context, trials)
    assert list(unreliable.store) == ["/bucket/runs/of another study/file"]
    assert unreliable.calls.count("rm") == 1
    assert not left.folder.exists()


def test_a_missing_package_is_named_without_the_password(tmp_path: Path) -> None:
    fsspec.register_implementation("absent", "absent_package.Files", errtxt="Install absent_package to use it")
    try:
        with pytest.raises(ConfigError) as refused:
            Storage("--checkpoints", f"absent://{SECRET}@bucket/folder")
    finally:
        known_implementations.pop("absent")
    text = str(refused.value)
    assert "--checkpoints absent://***@bucket/folder: absent needs a package that is not installed" in text
    assert "Install absent_package to use it" in text
    assert SECRET not in text
