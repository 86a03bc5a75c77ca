"""Every method on every task: planned, trained, registered, loaded back and equal; or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from matrix import METHODS, REFUSED, table
from task_bases import run_and_prove
from task_studies import TASKS, study_of

from adaptive_lora.allocation import METHODS as KNOWN
from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config import study_from
from adaptive_lora.config.sections import TASKS as TASK_NAMES
from adaptive_lora.errors import AdaptiveLoraError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial

NUMBERS_ALONE = (
    "linear_decay", "attention_heavy", "three_band", "planted", "given", "proportional", "family_uniform", "random",
    "inverse", "lr_only", "uniform:rank=2,placement", "uniform:rank=2,scaling",
)  # fmt: skip
PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


def chosen(task: str, *, refused: bool) -> list[str]:
    """Return the specifications that a task refuses, or those that it takes."""
    missing = importlib.util.find_spec("bitsandbytes") is None
    return [
        spec
        for name, spec in METHODS.items()
        if ((name, task) in REFUSED) is refused and not (missing and "nf4" in spec)
    ]


def drawn(task: str) -> list[str]:
    """Return a part: of language models each kind, of other tasks every fourth kind in turns.

    What differs from another one in its numbers alone is left out.
    """
    kinds = [spec for spec in METHODS.values() if not spec.startswith(NUMBERS_ALONE)]
    shift = TASKS.index(task)
    return [
        spec
        for number, spec in enumerate(kinds)
        if spec in chosen(task, refused=False) and (task == "causal" or (number + shift) % 4 == 0)
    ]


def test_no_method_and_no_task_is_missing() -> None:
    assert {MethodSpec.parse(spec).name for spec in METHODS.values()} == set(KNOWN)
    assert set(TASKS) == set(TASK_NAMES)
    assert all(
        sum(spec in drawn(task) for task in TASKS) > 1
        for spec in chosen("classification", refused=False)
        if not spec.startswith(NUMBERS_ALONE)
    )
    assert table(TASKS) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_what_works(task: str, own_store: str, tmp_path: Path) -> None:
    check(drawn(task), task, own_store, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_all_that_works(task: str, own_store: str, tmp_path: Path) -> None:
    check(chosen(task, refused=False), task, own_store, tmp_path)


def check(specs: list[str], task: str, own_store: str, tmp_path: Path) -> None:
    """Run a study; `run_and_prove` demands equal outputs and losses of what is loaded back."""
    options = {**study_of(task, tmp_path), "methods": specs, "tracking_uri": own_store}
    proven = run_and_prove(study_from(options))
    labels = {MethodSpec.parse(spec).label for spec in specs}
    assert {record.method for record in proven.records} == labels
    for record in proven.records:
        assert record.tags["task"] == task
        assert record.trainable_parameters > 0


@pytest.mark.parametrize("task", TASKS)
def test_what_is_refused(task: str, tmp_path: Path) -> None:
    options = study_of(task, tmp_path)
    for name, spec in METHODS.items():
        if (name, task) not in REFUSED or spec not in chosen(task, refused=True):
            continue
        with pytest.raises(AdaptiveLoraError, match=REFUSED[name, task]):
            run_once({**options, "methods": spec}, tmp_path)


def run_once(options: dict[str, object], folder: Path) -> None:
    """Run the only trial of a study."""
    context = StudyContext(study_from(options))
    run_trial(context, next(context.config.trials()), folder / "adapter")
