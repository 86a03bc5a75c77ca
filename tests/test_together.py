"""Trials trained together are the trials trained alone."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from mlflow.entities import Run
from rich.console import Console
from tracked import quiet, runs_in, store_in, trials_in

from adaptive_lora.config import StudyConfig, TrialSpec
from adaptive_lora.interruption import Interrupted
from adaptive_lora.methods.adapters import attach, detach
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.adapters.dropout import own_dropout, switch_off_dropout
from adaptive_lora.results import TrainResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.engines.here import run_here
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.run import open_study
from adaptive_lora.runner.schedule import Leg, group_size
from adaptive_lora.runner.trial import TrialOutcome
from adaptive_lora.tracking import connect
from adaptive_lora.training import Trainer, TrainInputs
from adaptive_lora.training.joint import loop as joint_memory
from adaptive_lora.training.joint.group import JointGroup
from adaptive_lora.training.joint.grouped import mount, take_off
from adaptive_lora.training.joint.loop import JointTraining, Member, joining_problem, passes_at_once
from adaptive_lora.training.memory import Estimate
from adaptive_lora.training.memory.estimate import SPREAD

MakeContext = Callable[..., StudyContext]
Weights = dict[str, torch.Tensor]
MIXED = {
    "methods": "uniform:rank=3 linear_decay:rank=4,low_rank=1 uniform:rank=2,placement=attention "
    "lr_only:of=linear_decay,rank=4,low_rank=1",
    "seeds": "0 1",
    "lr": "1e-2 3e-3",
    "alpha": 4,
    "max_steps": 4,
    "epochs": 9,
    "batch_size": 3,
    "validations": 2,
    "batching": "padded",
}


class Trainings:
    """Trains trials of a workbench alone or together, without recipes and records."""

    def __init__(self, context: StudyContext) -> None:
        switch_off_dropout(context.base.model)
        self.context = context
        self.base = context.base.model

    def parts(self, trial: TrialSpec, **more: Any) -> tuple[torch.nn.Module, TrainInputs]:
        context = self.context
        plan = context.plan(trial.method, seed=trial.seed, fold=trial.fold)
        adapted = attach(self.base, plan, seed=trial.seed, dropout=context.config.train.dropout)
        inputs = TrainInputs(
            examples=context.splits(trial.fold).train,
            collate=context.task.collate,
            losses_by_example=context.task.losses_by_example,
            running=context.task.running,
            validate=lambda model: context.losses(model, context.splits(trial.fold).validation).loss,
            lr_multipliers=plan.lr_multipliers(),
            **more,
        )
        return adapted, inputs

    def alone(self, trial: TrialSpec) -> tuple[TrainResult, Weights]:
        adapted, inputs = self.parts(trial)
        config = self.context.config.train
        try:
            result = Trainer(adapted, inputs, config, self.context.runtime, lr=trial.lr, seed=trial.seed).run()
            return result, weights_of(adapted)
        finally:
            detach(adapted)

    def member(self, trial: TrialSpec, **more: Any) -> Member:
        adapted, inputs = self.parts(trial, **more)
        trainer = Trainer(
            adapted, inputs, self.context.config.train, self.context.runtime,
            lr=trial.lr, seed=trial.seed,
        )  # fmt: skip
        assert joining_problem(trainer) is None
        trainer.start()
        return Member(trainer=trainer, layers=take_off(adapted))

    def together(self, trials: list[TrialSpec]) -> list[tuple[TrainResult, Weights]]:
        found = JointGroup([partial(self.alone, trial) for trial in trials]).run()
        assert not lora_layers(self.base)
        assert all(result.trials_together == len(trials) for result, _ in found)
        return found


def weights_of(adapted: torch.nn.Module) -> Weights:
    return {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}


def require_equal(found: tuple[TrainResult, Weights], alone: tuple[TrainResult, Weights]) -> None:
    (result, weights), (expected, expected_weights) = found, alone
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    steps, losses = zip(*result.validation_curve, strict=True)
    expected_steps, expected_losses = zip(*expected.validation_curve, strict=True)
    assert steps == expected_steps
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name in ("tokens", "step_tokens", "supervised_tokens", "order_digest", "skipped_steps"):
        assert getattr(result, name) == getattr(expected, name)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-6)


LONG = (("padded", "0"), ("packed", "0 1"))


@pytest.mark.parametrize(
    ("batching", "seeds"), [("packed", "0"), *(pytest.param(*long, marks=pytest.mark.long) for long in LONG)]
)
def test_every_trial_learns_as_if_alone(make_bench: MakeContext, batching: str, seeds: str) -> None:
    trainer = Trainings(make_bench(**{**MIXED, "batching": batching, "seeds": seeds}))
    trials = list(trainer.context.config.trials())
    assert len(trials) == 8 * len(seeds.split())
    alone = [trainer.alone(trial) for trial in trials]
    assert len({result.losses for result, _ in alone}) == len(trials)
    for found, expected in zip(trainer.together(trials), alone, strict=True):
        require_equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"dropout": 0.3}, marks=pytest.mark.long),
        {"dropout": 0.3, "batching": "packed"},
        {"accumulation": 2, "weight_decay": 0.1, "clip_norm": 0.01},
        pytest.param(
            {"folds": 3, "max_steps": None, "epochs": 1, "batch_size": 8, "seeds": "0", "dropout": 0.3},
            marks=pytest.mark.long,
        ),
        {"patience": 1, "validations": 5, "lr": "1e-12 1e-3", "seeds": "0"},  # one does not learn
    ],
    ids=[
        "adapter dropout",
        "adapter dropout on packed rows",
        "accumulation and clipping",
        "folds of other lengths",
        "early stopping",
    ],
)
def test_equal_under_other_settings(make_bench: MakeContext, changes: dict[str, object]) -> None:
    methods = "uniform:rank=2 linear_decay:rank=3,low_rank=1"
    trainer = Trainings(make_bench(**{**MIXED, "methods": methods, **changes}))
    trials = list(trainer.context.config.trials())
    alone = [trainer.alone(trial) for trial in trials]
    if "patience" in changes:
        assert {result.stopped_early for result, _ in alone} == {True, False}
    for found, expected in zip(trainer.together(trials), alone, strict=True):
        require_equal(found, expected)


def test_a_trial_that_becomes_nan_touches_no_other(make_bench: MakeContext) -> None:
    trainer = Trainings(make_bench(**{**MIXED, "seeds": "0", "max_skipped_steps": 1}))
    trials = list(trainer.context.config.trials())
    alone = [trainer.alone(trial) for trial in trials]
    members = [trainer.member(trial) for trial in trials]
    bad = members[2]
    spoil = next(iter(bad.layers.values())).lora_A["default"].weight
    with torch.no_grad():
        spoil[0, 0] = torch.nan
    JointTraining(members).run()
    assert "non-finite at step 2" in str(bad.failure)
    for number, (member, expected) in enumerate(zip(members, alone, strict=True)):
        mount(trainer.base, member.layers)
        if number != 2:
            assert member.failure is None
            require_equal((member.trainer.result(), weights_of(member.trainer.model)), expected)
        detach(member.trainer.model)


def test_out_of_memory_divides_the_group_then_the_batch(
    make_bench: MakeContext, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainings(make_bench(**{**MIXED, "seeds": "0", "batch_size": 4, "max_steps": 3}))
    trials = list(trainer.context.config.trials())
    alone = [trainer.alone(trial) for trial in trials]
    for room, sizes in ((16, {32, 16}), (3, {32, 16, 8, 4, 2})):
        seen: list[int] = []

        def refuse(module: torch.nn.Module, inputs: Any, seen: list[int] = seen, room: int = room) -> None:
            if module.training:
                seen.append(len(inputs[0]))
                if seen[-1] > room:
                    raise torch.OutOfMemoryError("CUDA out of memory.")

        hook = trainer.base.get_submodule("transformer.h.2").register_forward_pre_hook(refuse)
        found = trainer.together(trials)
        hook.remove()
        assert set(seen) == sizes
        assert seen.count(32) == 1  # later steps begin with what fits
        for one, expected in zip(found, alone, strict=True):
            require_equal(one, expected)
        assert {result.micro_batch for result, _ in found} == {min(room // 2 * 2, 4)}
    assert "trials per forward pass; continuing with 4" in caplog.text


def test_as_many_go_together_as_memory_takes(make_bench: MakeContext, caplog: pytest.LogCaptureFixture) -> None:
    """The base's weights count once; with room for no more than one, each divides its batch."""
    options = {**MIXED, "seeds": "0", "lr": "1e-2", "methods": "uniform:rank=2 uniform:rank=3"}
    options |= {"seeds": "0 1", "batch_size": 4, "max_steps": 2}
    context = make_bench(**options)
    plans = [context.plan(spec, seed=0, fold=0) for spec in context.config.specs]
    whole = max((context.memory(plan, 0).whole for plan in plans), key=lambda each: each.share)
    for trials_at_once, rows_at_once in ((3, {12, 4}), (1.9, {4}), (0.9, {2})):
        limit = SPREAD * (whole.weights + trials_at_once * whole.share)
        trainer = Trainings(make_bench(**options, max_memory=f"{limit / 2**10:.0f}KiB"))
        seen: set[int] = set()

        def note(module: torch.nn.Module, inputs: Any, seen: set[int] = seen) -> None:
            if module.training:
                seen.add(len(inputs[0]))

        def joined(trial: TrialSpec, trainer: Trainings = trainer) -> Member:
            context = trainer.context
            plan = context.plan(trial.method, seed=trial.seed, fold=0)
            choice = context.memory(plan, 0)
            return trainer.member(trial, micro_batch=choice.micro_batch, memory=choice.whole)

        hook = trainer.base.get_submodule("transformer.h.2").register_forward_pre_hook(note)
        members = [joined(trial) for trial in trainer.context.config.trials()]
        JointTraining(members).run()
        hook.remove()
        assert seen == rows_at_once
        assert all(member.failure is None for member in members)
    assert "3 of 4 trials are trained at once" in caplog.text


def test_a_gpus_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Estimate(weights=10_000, adapters=0, activations=100, head=0, work=0)
    other = dataclasses.replace(one, adapters=100)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for free, most in ((900, 4), (700, 3), (600, 2), (100, 1), (0, 1)):
        monkeypatch.setattr(joint_memory, "free_bytes", lambda device, free=free: free)
        assert passes_at_once([one, other, one, other], limit=None, device=gpu) == most, free
    assert passes_at_once([one] * 4, limit=None, device=cpu) == 4
    assert passes_at_once([one, None], limit=1, device=cpu) == 2


@pytest.fixture
def studies(empty_store: Path, make_study: Callable[..., StudyConfig], tmp_path: Path) -> Callable[..., list[Run]]:
    """Return a function that runs a study in a store of its own; the trials' runs come back."""

    def run(name: str, **changes: object) -> list[Run]:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(empty_store, folder / "mlflow.db")
        store = {"tracking_uri": store_in(folder), "output": str(folder)}
        context = StudyContext(make_study(**{"base_dropout": False, "engine": name, **store, **changes}))
        study = open_study(context, connect(context.config.tracking))
        legs = [Leg(trial=trial) for trial in context.config.trials()]
        with StudyProgress(Console(file=StringIO()), 6) as progress:
            for _, outcome in run_here(context, study, [legs], group_size(context.config), progress):
                assert isinstance(outcome, TrialOutcome)
        study.store.settle()
        return sorted(trials_in(folder), key=lambda run: run.info.run_name)

    return run


TIMED = {
    "tokens_per_second", "peak_memory_bytes", "train_seconds", "wall_seconds", "search_seconds",
    "trials_together", "profile/seconds", "profile/share_of_training",
}  # fmt: skip


def test_a_studys_records_do_not_depend_on_the_engine(studies: Callable[..., list[Run]]) -> None:
    methods = "uniform:rank=2 empirical:rank=2 truncate:rank=1"
    more = {"profile_batches": 2, "profile_batch_size": 2, "methods": methods}
    serial, together = (studies(name, **more) for name in ("serial", "together"))
    assert len(serial) == len(together) == 6
    for one, other in zip(serial, together, strict=True):
        assert other.info.status == one.info.status == "FINISHED"
        assert other.info.run_name == one.info.run_name
        free = {"mlflow.parentRunId", "adapter_model_uri", "adaptive_lora.run_key"}
        for tags in (one.data.tags, other.data.tags):
            for name in free & set(tags):
                del tags[name]
        assert other.data.tags == one.data.tags
        params = [{**run.data.params, "cfg.engine": ""} for run in (one, other)]
        assert params[0] == params[1]
        metrics, expected = other.data.metrics, one.data.metrics
        assert metrics.keys() == expected.keys()
        for name in metrics.keys() - TIMED:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
        grouped = 1 if "truncate" in one.info.run_name else 4
        assert (expected["trials_together"], metrics["trials_together"]) == (1, grouped)
        assert metrics["train_seconds"] > 0


def test_a_stopped_joint_training_goes_on(
    empty_store: Path, make_study: Callable[..., StudyConfig], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SIGTERM within a joint step: every trial leaves its own checkpoint, and ends as if alone."""
    from transformers import GPT2Model

    forward, passes = GPT2Model.forward, []

    def stopping(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        passes.extend([1] * self.training)
        if len(passes) == 3 and self.training:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, *args, **kwargs)

    def study(name: str) -> StudyConfig:
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(empty_store, tmp_path / name / "mlflow.db")
        own = {"tracking_uri": store_in(tmp_path / name), "output": str(tmp_path / name / "out")}
        return make_study(base_dropout=False, engine=name, max_steps=5, epochs=9, dropout=0.1, **own)

    quiet(study("serial"))
    config = study("together")
    with monkeypatch.context() as patch:
        patch.setattr(GPT2Model, "forward", stopping)
        with pytest.raises(Interrupted):
            quiet(config)
    assert len(passes) == 3  # of four trials at once
    assert [run.info.status for run in runs_in(tmp_path / "together")] == ["KILLED"] * 5
    checkpoints = (tmp_path / "together" / "out" / "checkpoints").rglob("training1-step*")
    assert [path.name for path in checkpoints] == ["training1-step000000002"] * 4
    quiet(config)
    found, expected = (trials_in(tmp_path / name) for name in ("together", "serial"))
    assert [run.info.status for run in found] == ["FINISHED"] * 4
    by_name = {run.info.run_name: run.data.metrics for run in expected}
    for run in found:
        for name in by_name[run.info.run_name].keys() - TIMED:
            other = by_name[run.info.run_name][name]
            assert run.data.metrics[name] == pytest.approx(other, rel=1e-5), name


def test_what_cannot_join_runs_alone_and_an_unstable_trial_fails_alone(
    make_study: Callable[..., StudyConfig], empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    config = make_study(
        tracking_uri=store_in(tmp_path), engine="together", seeds="0", lr="1e-2 1e30", max_steps=8,
        max_skipped_steps=0, epochs=99,
    )  # fmt: skip
    quiet(config)
    assert "trials train one by one: the base has dropout of its own" in caplog.text
    by_rate = {(run.data.tags["lr"], run.info.status) for run in trials_in(tmp_path)}
    assert by_rate == {("0.01", "FINISHED"), ("1e+30", "FAILED")}


@pytest.mark.parametrize("kept", [True, False])
def test_dropout_of_the_base_is_kept_or_switched_off(make_bench: MakeContext, kept: bool) -> None:
    context = make_bench(base_dropout=kept)
    found = [p for m in context.base.model.modules() for p in own_dropout(m).values()]
    assert found
    assert (max(found) == 0.1) == kept
    assert (max(found) == 0.0) != kept
    model = context.base.model.train()
    ids = torch.arange(5)[None]
    assert torch.equal(model(ids).logits, model(ids).logits) != kept


@pytest.mark.parametrize(("name", "settings"), [("opt", {"dropout": 0.4}), ("llama", {"attention_dropout": 0.4})])
def test_dropout_that_a_base_keeps_as_an_attribute_is_switched_off(name: str, settings: dict[str, float]) -> None:
    kind, common, _ = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**{**common, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(5)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_size_of_groups_follows_the_engine(make_study: Callable[..., StudyConfig]) -> None:
    """`auto` trains one trial after another, on a GPU too, until a measurement on one says otherwise."""
    sizes = {engine: group_size(make_study(engine=engine)) for engine in ("auto", "serial", "together", "ray")}
    assert sizes == {"auto": 1, "serial": 1, "together": 16, "ray": 1}
    assert group_size(make_study(engine="ray", group_size=4)) == 4
