"""Several metrics in one pass, its memory, and what a profile could see."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from profiled import profile

from adaptive_lora.cli import main
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.importance import ImportanceProfile, profile_importances
from adaptive_lora.methods.importance.contract import Measurement, PassLimits, SiteMeasure
from adaptive_lora.methods.importance.passes import halved
from adaptive_lora.methods.importance.visible import visible
from adaptive_lora.models.kernels import attends_packed
from adaptive_lora.runner import profiling
from adaptive_lora.runner.context import StudyContext

BaseContext = Callable[..., StudyContext]
GRADIENT = ("weight_gradient", "gradient_norm", "gradient_variance", "whitened_gradient")


@pytest.fixture
def context(make_bench: BaseContext) -> StudyContext:
    return make_bench(profile_batches=4, profile_batch_size=3)


def close(one: ImportanceProfile, other: ImportanceProfile, tolerance: float) -> None:
    """Check scores and spectra, relative to the largest of each site."""
    assert one.scores == pytest.approx(dict(other.scores), rel=tolerance)
    spectra = [p.replicates if p.spectra is None else (p.spectra, *p.replicates) for p in (one, other)]
    for ours, theirs in zip(*spectra, strict=True):
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], abs=tolerance * max(1e-12, *theirs[name]))


def test_metrics_of_one_pass_equal_those_alone(context: StudyContext) -> None:
    task, passes = context.profile_task(seed=0, fold=0), 0

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return context.loss(model, batch)  # type: ignore[arg-type]

    found = profile_importances(dataclasses.replace(task, loss=loss), metrics=GRADIENT, seed=0)
    assert passes == len(halved(task.batches, task.limits.backward_tokens, divide=True)) < 12
    assert found["weight_gradient"].processed_tokens == sum(batch.tokens for batch in task.batches)  # once
    assert all(each.together == GRADIENT for each in found.values())
    for metric, each in found.items():
        alone = profile(context, metric)
        close(each, alone, 0)
        assert alone.together == (metric,)
        assert each.processed_tokens == alone.processed_tokens


def test_packed_rows_and_groups_of_sites_give_the_same(context: StudyContext) -> None:
    task = context.profile_task(seed=0, fold=0)
    seen: list[bool] = []

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        seen.append(attends_packed(model))
        return context.loss(model, batch)  # type: ignore[arg-type]

    packed = profile_importances(dataclasses.replace(task, loss=loss), metrics=GRADIENT, seed=0)
    assert all(seen)
    few = PassLimits(backward_tokens=1, room=1)  # one example a pass, one site a group
    narrow = dataclasses.replace(task, running=lambda model: nullcontext(), limits=few, loss=loss)
    grouped = profile_importances(narrow, metrics=GRADIENT, seed=0)
    assert len(seen) > 12 * len(context.sites)
    for metric in GRADIENT:
        close(packed[metric], grouped[metric], 1e-4)


def test_a_study_measures_its_metrics_once_per_seed(make_bench: BaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_bench(
        methods="empirical:rank=2 waterfill:rank=2 proportional:rank=2,metric=stable_rank", profile_batches=2
    )
    asked: list[list[str]] = []
    usual = profiling.measured

    def counted(task: object, metrics: list[str]) -> object:
        asked.append(list(metrics))
        return usual(task, metrics)  # type: ignore[arg-type]

    monkeypatch.setattr(profiling, "measured", counted)
    for seed in (0, 1):
        for spec in context.config.specs:
            context.profile_of(spec, seed=seed, fold=0)
    once = [["weight_gradient", "whitened_gradient"], ["stable_rank"]]
    assert asked == 2 * once


def test_a_shared_pass_leaves_each_error_to_its_own_method(
    make_bench: BaseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_bench(methods="empirical:rank=2 waterfill:rank=2", profile_batches=2)
    usual = profiling.profile_of

    def broken(task: object, metric: str, *given: object, **named: object) -> object:
        if metric == "whitened_gradient":
            raise AllocationError("every site scores 0")
        return usual(task, metric, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(profiling, "profile_of", broken)
    assert context.profile("weight_gradient", seed=0, fold=0).scores
    with pytest.raises(AllocationError, match="every site scores 0"):
        context.profile("whitened_gradient", seed=0, fold=0)


@pytest.mark.parametrize("limit", [None, "60MB"])
def test_passes_take_no_more_than_a_training_step(make_bench: BaseContext, limit: str | None) -> None:
    changes = {} if limit is None else {"max_memory": limit}
    context = make_bench(batch_size=8, profile_batches=4, profile_batch_size=8, **changes)
    limits = context.profile_task(seed=0, fold=0).limits
    longest = context.splits(0).longest
    assert limits.backward_tokens is not None
    assert limits.room is not None
    assert limits.backward_tokens <= 8 * longest
    assert (limits.forward_tokens is None) == (limit is None)


def test_components_above_the_edge_and_the_rank_that_covers_them() -> None:
    def measures(**spectra: tuple[float, ...]) -> dict[str, SiteMeasure]:
        return {name: SiteMeasure(score=sum(values), spectrum=values) for name, values in spectra.items()}

    whole, same, less = (
        measures(a=(3.0, 1.0, 0.0), b=(0.0,)), measures(a=(2.0, 0.5), b=(0.0,)), measures(a=(2.0, 0.0), b=(1.0,)),
    )  # fmt: skip
    assert visible("gradient_norm", Measurement(whole=whole, halves=(same, less)), 9) is None
    changing = visible("whitened_gradient", Measurement(whole=whole, halves=(same, less)), 9)
    assert changing is not None
    assert (changing.components, changing.whole.rank, changing.settled) == ({"a": 2, "b": 0}, 2, None)
    assert [half.examples for half in changing.halves] == [5, 4]
    assert [half.components for half in changing.halves] == [2, 2]
    assert "2 components above the noise edge at 1 of 2 sites; uniform rank 2" in changing.sentence()
    assert "rank 2 and 1 with half of the examples: still changing at 9" in changing.sentence()
    settled = visible("whitened_gradient", Measurement(whole=whole, halves=(same, same)), 9)
    assert settled is not None
    assert settled.settled == 4
    assert type(settled).from_dict(json.loads(json.dumps(settled.to_dict()))) == settled


def test_earlier_profiles_are_read(context: StudyContext) -> None:
    found = profile(context, "whitened_gradient")
    assert found.visible is not None
    assert found.visible.whole.components == sum(v > 0 for row in (found.spectra or {}).values() for v in row)
    values = {key: value for key, value in found.to_dict().items() if key not in ("visible", "together")}
    earlier = ImportanceProfile.from_json(json.dumps(values))
    assert (earlier.visible, earlier.together, earlier.scores) == (None, (), found.scores)


def test_the_command_takes_several_metrics(base_folder: Path, data_file: Path) -> None:
    words = ["--model", str(base_folder), "--data", str(data_file), "--template", "compact", "--json"]
    few = ["--profile-batches", "2", "--profile-batch-size", "2", "--output", "found"]
    metrics = "whitened_gradient,weight_gradient"
    result = CliRunner().invoke(main, ["profile", *words, *few, "--metric", metrics])
    document = json.loads(result.stdout)
    assert document["metric"] == "whitened_gradient"
    assert [one["metric"] for one in document["others"]] == ["weight_gradient"]
    assert document["visible"]["whole"]["rank"] == max(document["visible"]["components"].values())
    assert "uniform rank" in result.stderr
    assert "in one pass with weight_gradient" in result.stderr.replace("\n", " ")
    assert {file.name for file in Path("found").glob("*.json")} == {
        "profile_whitened_gradient_seed0.json", "profile_weight_gradient_seed0.json",
    }  # fmt: skip
    wrong = CliRunner().invoke(main, ["profile", *words, "--metric", "whitened_gradient,gradientnorm"])
    assert wrong.exit_code == 2
    assert "did you mean 'gradient_norm'" in wrong.stderr
