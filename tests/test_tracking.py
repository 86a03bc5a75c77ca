"""Tracking in a SQLite store: runs, artifacts, resuming, failing, and what a person is told."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from rich.console import Console
from tracked import Finished, quiet, runs_in, store_in, trials_in, words_of

from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.runner import run as study_module
from adaptive_lora.runner import trial as study_trial
from adaptive_lora.runner.comparison_input import Selection
from adaptive_lora.runner.run import compare_study
from adaptive_lora.runner.steps import run_train
from adaptive_lora.tracking import Recorder
from adaptive_lora.training import StepEvent


def test_one_parent_and_one_level_of_children(finished: Finished) -> None:
    assert (finished.folder / "mlflow.db").is_file()
    assert len(finished.runs) == 5
    assert finished.parent.info.status == "FINISHED"
    assert finished.parent.data.tags["study_id"] == finished.outcome.study_result.study_id
    assert {run.data.tags["mlflow.parentRunId"] for run in finished.children} == {finished.parent.info.run_id}
    tags, comparison = finished.parent.data.tags, finished.outcome.study_result.comparison
    assert tags["mlflow.note.content"].startswith("# Study study\n\n**")
    assert tags["verdict"] == comparison.answer
    assert tags["champion"] == comparison.winner
    losses = finished.parent.data.metrics
    assert losses["study/champion_test_loss"] == comparison.method(comparison.winner).loss.mean
    experiment = finished.client.get_experiment(finished.parent.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_long_description_ends_at_a_paragraph_and_says_where_it_goes_on(finished: Finished) -> None:
    run = Recorder(finished.outcome.store, finished.children[0].info.run_id)
    run.describe("\n\n".join(["a paragraph " * 30] * 50))
    assert run.flush(patience=60)
    run.store.close()
    note = finished.client.get_run(run.run_id).data.tags["mlflow.note.content"]
    assert len(note) <= 8_000
    assert note.endswith(
        "a paragraph \n\nThe whole text is the artifact `report/report.md`; `report/report.html` shows it all."
    )


def test_children_carry_their_identity_as_tags(finished: Finished) -> None:
    seen = set()
    for run in finished.children:
        tags = run.data.tags
        assert run.info.status == "FINISHED"
        assert tags["study_id"] == finished.outcome.study_result.study_id
        assert tags["lr"] == "0.002"
        assert tags["fold"] == "0"
        assert len(tags["trial_signature"]) == 16
        seen.add((tags["method"], tags["seed"], tags["trial_signature"]))
    labels = {spec.label for spec in finished.config.specs}
    assert {(method, seed) for method, seed, _ in seen} == {(label, seed) for label in labels for seed in "01"}
    assert len({signature for _, _, signature in seen}) == 4


def test_parameters_are_namespaced_and_short(finished: Finished) -> None:
    for run in finished.children:
        params = run.data.params
        assert all(key.split(".")[0] in ("cfg", "method", "trial", "data", "model") for key in params)
        assert max(map(len, params.values())) <= 500
        assert params["trial.lr"] == "0.002"
        assert params["cfg.max_steps"] == "2"
        assert params["method.name"] == run.data.tags["method"].split("-")[0]
        assert int(params["data.train_supervised_tokens"]) > 0
    assert finished.parent.data.params == {}


def test_plans_profiles_and_example_losses_are_artifacts(finished: Finished) -> None:
    store = finished.outcome.store
    for run in finished.children:
        plan = store.read_json(run.info.run_id, "rank_plan.json")
        assert plan["trainable_parameters"] == run.data.metrics["trainable_parameters"]
        result = store.read_json(run.info.run_id, "trial.json")
        test = result["test"]
        assert len(test["example_ids"]) == len(test["nll"]) == len(test["tokens"])
        assert sum(test["nll"]) / sum(test["tokens"]) == run.data.metrics["test/loss"]
        names = {item.path for item in finished.client.list_artifacts(run.info.run_id)}
        has_profile = "profile_weight_gradient.json" in names
        assert has_profile == (run.data.tags["method"].startswith("empirical"))
    names = {item.path for item in finished.client.list_artifacts(finished.parent.info.run_id)}
    assert {"study.json", "frozen.json", "report"} <= names
    report = finished.client.list_artifacts(finished.parent.info.run_id, "report")
    assert "report/report.html" in {item.path for item in report}


def test_metrics_have_steps(finished: Finished) -> None:
    for run in finished.children:
        history = finished.client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in history] == [1, 2]
        curve = finished.client.get_metric_history(run.info.run_id, "validation/loss")
        recorded = finished.outcome.store.read_json(run.info.run_id, "trial.json")
        points = [[point.step, point.value] for point in curve]
        assert points == [point for point in recorded["validation_curve"] if point[0] > 0]
        assert run.data.metrics["skipped_steps"] == 0
        assert {"test/perplexity", "tokens_per_second", "wall_seconds", "efficiency_ratio"} <= set(run.data.metrics)


def test_tokens_are_an_axis_and_every_method_of_a_seed_learned_in_the_same_order(finished: Finished) -> None:
    orders: dict[str, set[str]] = {}
    for run in finished.children:
        history = finished.client.get_metric_history(run.info.run_id, "train/tokens")
        assert [point.step for point in history] == [1, 2]
        result = finished.outcome.store.read_json(run.info.run_id, "trial.json")
        steps = [step for step, _ in result["validation_curve"]]
        assert result["validation_tokens"] == [0 if step == 0 else int(history[step - 1].value) for step in steps]
        orders.setdefault(run.data.tags["seed"], set()).add(run.data.tags["order_digest"])
        assert "torch" in run.data.tags["packages"]
    assert all(len(digests) == 1 for digests in orders.values())
    assert len(set.union(*orders.values())) == len(orders)  # seeds differ


def test_data_set_is_an_input_with_its_digest(finished: Finished) -> None:
    tested = set()
    for run in finished.runs:
        given = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
        assert len(given) == len(run.inputs.dataset_inputs)
        assert given.keys() == {"training", "test"}
        assert given["training"].digest == run.data.tags["data_digest"]
        assert all(len(data.digest) <= 36 for data in given.values())
        assert given["test"].name == "rows.json·test"
        tested.add(given["test"].digest)
    assert len(tested) == 1  # one split, whichever run scored it


def test_the_same_command_again_runs_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    before = {run.info.run_id for run in finished.runs}
    outcome, shown = quiet(finished.config)
    assert outcome.trials_run == 0
    assert "4 trials are finished already" in shown
    assert {run.info.run_id for run in finished.runs} == before
    assert outcome.study_result.champion == finished.outcome.study_result.champion
    name = finished.config.tracking.registered_model
    assert len(finished.client.search_model_versions(f"name='{name}'")) == 1
    training, _ = finished.parent.inputs.dataset_inputs
    assert training.dataset.digest == finished.parent.data.tags["data_digest"]


def test_compare_again_adds_no_version(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    study_result, _ = compare_study(TrackingConfig(), Selection(), {"output": "again"}, Console(file=io.StringIO()))
    assert study_result.champion == finished.outcome.study_result.champion
    assert study_result.report().is_relative_to("again")
    assert len(finished.runs) == 5
    before, again = (one.comparison.to_dict() for one in (finished.outcome.study_result, study_result))
    # Facts are those of the last process that ran the study: threads and command may differ.
    assert before.pop("facts").keys() == again.pop("facts").keys()
    assert again == before


def test_only_new_trials_run(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    first, _ = quiet(in_store())
    before = [run.info.run_id for run in trials_in(tmp_path)]
    more, _ = quiet(in_store(seeds="0 1", methods="uniform:rank=2 uniform:rank=1"))
    assert (first.trials_run, more.trials_run) == (1, 3)
    assert more.study_result.study_id == first.study_result.study_id
    trials = trials_in(tmp_path)
    assert [run.info.run_id for run in trials][:1] == before
    labels = {(run.data.tags["method"], run.data.tags["seed"]) for run in trials}
    assert len(trials) == len(labels) == 4
    assert len(runs_in(tmp_path)) == 5


def test_trained_trials_make_one_study(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    run_train(in_store(), None, console)
    run_train(in_store(methods="uniform:rank=1"), tmp_path / "adapter", console)
    run_train(in_store(methods="uniform:rank=1"), None, console)
    assert "was finished before" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    tracking = TrackingConfig(tracking_uri=store_in(tmp_path))
    study_result, _ = compare_study(tracking, Selection(), {}, console)
    assert {method.label for method in study_result.comparison.methods} == {"uniform-r1", "uniform-r2"}
    assert study_result.comparison.baseline == "uniform-r2"
    assert len(runs_in(tmp_path)) == 3


def test_an_interrupted_study_continues(
    in_store: Callable[..., StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_step = study_trial.log_step
    calls = {"left": 3}

    def interrupted(run: Any, event: StepEvent) -> None:
        calls["left"] -= 1
        if calls["left"] == 0:  # the second trial's first step
            raise KeyboardInterrupt
        log_step(run, event)

    config = in_store(seeds="0 1")
    with monkeypatch.context() as patch:
        patch.setattr(study_trial, "log_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet(config)
    statuses = {run.data.tags.get("seed", "parent"): run.info.status for run in runs_in(tmp_path)}
    assert statuses == {"parent": "KILLED", "0": "FINISHED", "1": "KILLED"}
    # A process that was cut off leaves its run RUNNING.
    killed = next(run for run in trials_in(tmp_path) if run.info.status == "KILLED")
    client = MlflowClient(store_in(tmp_path))
    client.update_run(killed.info.run_id, status="RUNNING")
    outcome, _ = quiet(config)
    assert outcome.trials_run == 1
    assert client.get_run(killed.info.run_id).info.status == "FINISHED"  # in the same run
    assert [run.info.status for run in trials_in(tmp_path)] == ["FINISHED", "FINISHED"]
    losses = client.get_metric_history(killed.info.run_id, "train/loss")
    assert [point.step for point in losses] == [1, 2]
    assert {seed for method in outcome.study_result.comparison.methods for seed in method.seeds} == {0, 1}


def test_an_unstable_trial_fails_and_the_study_goes_on(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    # At this rate the first step that moves makes the weights, and then the loss, overflow.
    config = in_store(lr="1e-2,1e38", warmup_share=0, max_skipped_steps=0, clip_norm=0)
    outcome, shown = quiet(config)
    stable, unstable = sorted(trials_in(tmp_path), key=lambda run: float(run.data.tags["lr"]))
    assert (stable.info.status, unstable.info.status) == ("FINISHED", "FAILED")
    assert "non-finite at step 2" in unstable.data.tags["failure"]
    assert "FAILED" in shown
    text = json.dumps(outcome.study_result.comparison.to_dict(), allow_nan=False)
    assert "non-finite at step 2" in text
    assert "non-finite" in outcome.study_result.report().read_text(encoding="utf-8")


def test_a_last_step_that_ruins_the_weights_fails_the_trial(
    in_store: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    config = in_store(lr="1e-2,1e38", warmup_share=0, max_steps=1, clip_norm=0)
    outcome, _ = quiet(config)
    failed = next(run for run in trials_in(tmp_path) if run.info.status == "FAILED")
    assert "validation loss is nan after training" in failed.data.tags["failure"]
    assert outcome.study_result.champion is not None
    for run in trials_in(tmp_path):
        assert all(math.isfinite(value) for value in run.data.metrics.values())


def test_a_study_whose_trials_all_failed_says_why(
    empty_store: Path, options: dict[str, object], tmp_path: Path
) -> None:
    unstable = {"lr": "1e38", "warmup_share": 0, "max_skipped_steps": 0, "clip_norm": 0}
    own = {"tracking_uri": store_in(tmp_path), "max_steps": 2, "seeds": 0}
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    given = {**options, **own, "methods": "uniform:rank=2", **unstable}
    result = CliRunner().invoke(main, ["study", *words_of(given)])
    assert result.exit_code == 2
    assert "no finished trial" in result.output
    assert "non-finite at step 2" in result.output
    assert [run.info.status for run in runs_in(tmp_path)] == ["FAILED", "FAILED"]


def test_a_broken_base_is_an_error_before_anything_is_written(
    in_store: Callable[..., StudyConfig], base_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["transformer.wpe.weight"] = torch.full_like(weights["transformer.wpe.weight"], math.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(study_module.ModelError, match="non-finite test loss"):
        quiet(in_store(model=str(broken)))
    assert runs_in(tmp_path) == []
