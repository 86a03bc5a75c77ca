"""A whole study of every recipe: tracked, compared, proven, with what is less than fair said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Run
from tracked import Finished, quiet

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.plan import plan_method
from adaptive_lora.runner.result import prove
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder
from adaptive_lora.tracking.runs import HISTORY, read_trials

METHODS = (
    "uniform:rank=2",
    "adalora:rank=2",
    "grow_prune:rank=2,interval=3,move_share=0.3",
    "truncate:rank=2",
    "truncate_retrain:rank=2",
    "eva:rank=2",
    "eva:budget=uniform-2",
    "gora:rank=2",
)


@pytest.fixture(scope="module")
def studied(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Finished:
    """Eight methods x 2 seeds of 20 steps, in a store of their own."""
    from conftest import rows
    from tracked import store_in

    folder = tmp_path_factory.mktemp("recipes")
    (folder / "rows.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    config = study_from(
        {
            "model": str(base_folder),
            "data": str(folder / "rows.json"),
            "template": "compact",
            "max_tokens": 120,
            "methods": " ".join(METHODS),
            "seeds": "0 1",
            "lr": "1e-2",
            "epochs": 9,
            "max_steps": 20,
            "batch_size": 4,
            "validations": 2,
            "generate": "off",
            "precision": "fp32",
            "dropout": 0.1,
            "tracking_uri": store_in(folder),
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome, shown = quiet(config)
    return Finished(folder=folder, config=config, outcome=outcome, shown=shown)


def by_label(studied: Finished) -> dict[str, list[Run]]:
    """Return the trials' runs by method."""
    found: dict[str, list[Run]] = {}
    for run in studied.children:
        found.setdefault(run.data.tags["method"], []).append(run)
    return found


def test_every_trial_finished_within_its_budget(studied: Finished) -> None:
    runs = by_label(studied)
    assert len(runs) == len(METHODS)
    assert all(run.info.status == "FINISHED" for each in runs.values() for run in each)
    budget = runs["uniform-r2"][0].data.metrics["trainable_parameters"]
    for label, each in runs.items():
        for run in each:
            final = run.data.metrics["trainable_parameters"]
            most = run.data.metrics["training_parameters"]
            assert final <= budget or label in ("eva-r2", "gora-r2")
            above = label.startswith(("adalora", "truncate"))
            assert (most > budget) == above or label in ("eva-r2", "gora-r2")


def test_the_audit_names_who_trained_more(studied: Finished) -> None:
    findings = " ".join(entry.text for entry in studied.outcome.study_result.comparison.audit)
    for label in ("adalora-r2", "truncate-r2", "truncate_retrain-r2"):
        assert f"{label}: trained up to" in findings
    assert "grow_prune-r2-every3-move0.3: trained up to" not in findings
    assert "uniform-r2: trained up to" not in findings
    assert "truncate_retrain-r2: trained 2 times a trial" in findings
    assert "truncate-r2: trained 2 times" not in findings


def test_rank_histories_are_logged(studied: Finished) -> None:
    for label, each in by_label(studied).items():
        dynamic = label.startswith(("adalora", "truncate", "grow_prune"))
        for run in each:
            logged = {item.path for item in studied.client.list_artifacts(run.info.run_id)}
            assert (HISTORY in logged) == dynamic
            if dynamic:
                points = studied.client.get_metric_history(run.info.run_id, "ranks/total")
                events = studied.outcome.store.read_json(run.info.run_id, HISTORY)
                assert {p.step: p.value for p in points} == {
                    event["step"]: sum(event["ranks"].values()) for event in events
                }


def test_every_adapter_reloads_as_it_was_tested(studied: Finished) -> None:
    context = StudyContext(studied.config)
    runs = {run.info.run_id: run for run in studied.children if run.data.tags["seed"] == "0"}
    records = read_trials(studied.outcome.store, runs.values())
    assert len(records) == len(METHODS)
    for record in records:
        uri = runs[record.run_id].data.tags[MODEL_TAG]
        assert prove(context, record, uri).max_logit_difference == 0
        config = json.loads((adapter_folder(uri) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"  # folded: every server of LoRA loads it
        assert config["init_lora_weights"] is True


def test_a_study_plans_what_is_decided_in_training(make_study: Callable[..., StudyConfig]) -> None:
    config = make_study(methods="adalora:rank=2")
    context = StudyContext(config)
    plan = context.plan(config.specs[0], seed=0, fold=0)
    assert plan.trainable_parameters == plan.budget
    report = plan_method(config, config.specs[0])
    assert report.plan.rank_pattern() == plan.rank_pattern()
    assert "adalora-r2 decides its ranks later" in (report.note or "")
    assert plan_method(config, MethodSpec.parse("uniform")).note is None
