"""Transfer: profiles from other tasks, one shared allocation, and the table."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import rows
from rich.console import Console

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import ConfigError, DataError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.transfer import SHARED, run_transfer
from adaptive_lora.runner.trial import run_trial

BaseContext = Callable[..., StudyContext]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Sixty rows of another task: answer with the first word, in other words."""
    path = tmp_path / "first.json"
    items = [
        {**row, "instruction": f"First {i}", "output": row["input"].split()[0] * 3}
        for i, row in enumerate(rows(60, seed=5))
    ]
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def test_a_profile_from_another_task_is_that_tasks_own(make_bench: BaseContext, other: Path) -> None:
    here = make_bench(methods=f"empirical:rank=2,profiled_on={other}")
    there = make_bench(data=str(other), methods="empirical:rank=2")
    (spec,) = here.config.specs
    borrowed = here.profile("weight_gradient", seed=0, fold=0, tasks=spec.profiled_on)
    assert borrowed.scores == there.profile("weight_gradient", seed=0, fold=0).scores
    assert borrowed.scores != here.profile("weight_gradient", seed=0, fold=0).scores
    plan = here.plan(spec, seed=0, fold=0)
    own = there.plan(there.config.specs[0], seed=0, fold=0)
    assert plan.rank_pattern() == own.rank_pattern()


def test_a_trial_records_the_profile_that_its_ranks_follow(
    make_bench: BaseContext, other: Path, tmp_path: Path
) -> None:
    context = make_bench(methods=f"empirical:rank=2,profiled_on={other}", seeds="0", max_steps=1)
    (trial,) = context.config.trials()
    outcome = run_trial(context, trial, tmp_path / "adapter")
    assert outcome.profile is context.profile("weight_gradient", seed=0, fold=0, tasks=trial.method.profiled_on)
    assert outcome.profile is not context.profile("weight_gradient", seed=0, fold=0)


def test_a_shared_profile_takes_the_tasks_in_turn(make_bench: BaseContext, other: Path) -> None:
    context = make_bench(methods=f"empirical:rank=2,profiled_on=own+{other}")
    (spec,) = context.config.specs
    shared = context.splits(0, spec.profiled_on).train
    own = context.splits(0).train
    assert shared[0::2] == own[: len(shared) // 2]
    assert not {e.id for e in shared[1::2]} & {e.id for e in own}
    assert len(shared) == 2 * len(own)  # the other task is larger and counts no more


def test_what_was_profiled_on_is_part_of_the_identity_by_content(make_bench: BaseContext, other: Path) -> None:
    methods = f"empirical:rank=2 empirical:rank=2,profiled_on={other}"
    context = make_bench(methods=methods, seeds="0")
    before = [context.signature(trial) for trial in context.config.trials()]
    assert len(set(before)) == 2
    other.write_text(json.dumps(rows(50, seed=9)), encoding="utf-8")
    changed = make_bench(methods=methods, seeds="0")
    after = [changed.signature(trial) for trial in changed.config.trials()]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_own_alone_is_the_study_itself(make_bench: BaseContext) -> None:
    context = make_bench(methods="empirical:rank=2,profiled_on=own")
    assert context.splits(0, ("own",)) is context.splits(0)
    own = context.profile("weight_gradient", seed=0, fold=0)
    assert context.profile("weight_gradient", seed=0, fold=0, tasks=("own",)) is own


@pytest.mark.parametrize("text", ["uniform:profiled_on=x.json", "adalora:profiled_on=x.json"])
def test_methods_without_a_profile_refuse_it(text: str) -> None:
    with pytest.raises(ConfigError, match="follows no importance profile"):
        MethodSpec.parse(text)


def test_missing_task_is_said_before_anything_is_written(make_bench: BaseContext) -> None:
    with pytest.raises(DataError, match="does not exist"):
        make_bench(methods="empirical:rank=2,profiled_on=nowhere.json")


def test_transfer_fills_the_table(in_store: Callable[..., StudyConfig], other: Path, data_file: Path) -> None:
    config = in_store(seeds="0 1", lr="1e-2")
    console = Console(file=io.StringIO(), width=200)
    table = run_transfer(config, [str(data_file), str(other)], "empirical:rank=2", console)
    assert table.tasks == ("rows", "first")
    assert {(c.allocated_on, c.trained_on) for c in table.cells} == {
        (source, task) for source in ("rows", "first", SHARED) for task in ("rows", "first")
    }
    assert all(c.difference is not None for c in table.cells)
    budgets = {c.trainable_parameters for c in table.cells}
    assert max(budgets) - min(budgets) < 0.05 * max(budgets)  # type: ignore[type-var,operator]
    folder = Path(config.tracking.output) / f"{config.study}-transfer"
    assert json.loads((folder / "transfer.json").read_text()) == json.loads(json.dumps(table.to_dict()))
    assert "| all tasks |" in (folder / "transfer.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "a.json"], "at least two --data"),
        (["--data", "x/a.json", "--data", "y/a.json"], "different names"),
        (["--data", "a.json", "--data", "b.json", "--method", "uniform"], "no importance profile"),
        (["--data", "a b.json", "--data", "c.json"], "no space"),
        (["--data", "a.json", "--data", "b.json"], "does not exist"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path) -> None:
    files = [tmp_path / word for word in words if word.endswith(".json")]
    for path in files if message != "does not exist" else ():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows(4)), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, ["transfer", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before
