"""A whole study of families: tracked, compared, proven, registered and served."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from conftest import rows
from mlflow.entities import Run
from tracked import Finished, quiet, store_in

from adaptive_lora.allocation import RankPlan, TunerPlan, read_plan
from adaptive_lora.config import study_from
from adaptive_lora.errors import AdapterError
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.result import prove
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder
from adaptive_lora.tracking.runs import PLAN, read_trials

METHODS = (
    "uniform:rank=2", "prompt_tuning:tokens=3", "prefix_tuning:tokens=3",
    "p_tuning:tokens=3,encoder_width=4", "ia3", "houlsby:width=2", "pfeiffer:width=2",
    "pfeiffer:budget=uniform-2", "full", "bitfit", "ln_tuning", "head_only",
)  # fmt: skip


@pytest.fixture(scope="module")
def studied(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Finished:
    """Twelve methods of two steps, in a store of their own."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "rows.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    config = study_from(
        {
            "model": str(base_folder),
            "data": str(folder / "rows.json"),
            "template": "compact",
            "max_tokens": 120,
            "methods": " ".join(METHODS),
            "seeds": "0",
            "lr": "1e-2",
            "max_steps": 2,
            "batch_size": 4,
            "validations": 1,
            "generate": "off",
            "precision": "fp32",
            "tracking_uri": store_in(folder),
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome, shown = quiet(config)
    return Finished(folder=folder, config=config, outcome=outcome, shown=shown)


def by_label(studied: Finished) -> dict[str, Run]:
    """Return the trials' runs by method."""
    return {run.data.tags["method"]: run for run in studied.children}


def test_plans_and_counts_are_recorded(studied: Finished) -> None:
    runs = by_label(studied)
    assert len(runs) == len(METHODS)
    for label, run in runs.items():
        values = studied.outcome.store.read_json(run.info.run_id, PLAN)
        plan = read_plan(values)
        assert isinstance(plan, RankPlan if label.startswith("uniform") else TunerPlan)
        metrics = run.data.metrics
        assert plan.trainable_parameters == metrics["trainable_parameters"]
        share = metrics["trainable_parameters"] / metrics["total_parameters"]
        assert metrics["reduction_vs_full"] == pytest.approx(1 - share)
    assert runs["full"].data.metrics["reduction_vs_full"] == 0
    budget = runs["uniform-r2"].data.metrics["trainable_parameters"]
    assert runs["pfeiffer@uniform-2"].data.metrics["trainable_parameters"] <= budget


def test_every_method_is_compared_and_reported(studied: Finished) -> None:
    comparison = studied.outcome.study_result.comparison
    assert {method.label for method in comparison.methods} == set(by_label(studied))
    assert {found.method for found in comparison.budgets} == {"uniform-r2"}
    page = (studied.folder / studied.outcome.study_result.report()).read_text(encoding="utf-8")
    for label in by_label(studied):
        assert label in page


def test_every_adapter_is_proven_without_any_difference(studied: Finished) -> None:
    context = StudyContext(studied.config)
    for record in read_trials(studied.outcome.store, studied.children):
        run = by_label(studied)[record.method]
        proof = prove(context, record, run.data.tags[MODEL_TAG])
        assert proof.max_logit_difference == proof.max_loss_difference == 0.0


@pytest.mark.parametrize("label", ["houlsby-w2", "full", "prefix_tuning-n3", "prompt_tuning-n3"])
def test_served_models_answer_without_this_package(studied: Finished, label: str) -> None:
    """The serving code travels with the model; nothing of it imports `adaptive_lora`."""
    uri = by_label(studied)[label].data.tags[MODEL_TAG]
    served = mlflow.pyfunc.load_model(uri)
    questions = pd.DataFrame({"instruction": ["Swap 1", "Swap 22"], "input": ["red blue", None]})
    answers = served.predict(questions, params={"max_new_tokens": 3})
    assert len(answers) == 2
    code = adapter_folder(uri).parents[1] / "code" / "adapter_serving"
    assert (code / "custom_tuner.py").is_file()
    for path in code.rglob("*.py"):
        names = r"[`\"]adaptive_lora\.(json|peft_types)[`\"]"  # of a file and of a group of entry points
        assert "adaptive_lora." not in re.sub(names, "", path.read_text(encoding="utf-8"))


def test_export(studied: Finished, tmp_path: Path) -> None:
    runs = by_label(studied)
    folders = {
        label: adapter_folder(runs[label].data.tags[MODEL_TAG])
        for label in ("full", "houlsby-w2", "ia3", "prompt_tuning-n3")
    }
    export_merged(folders["full"], tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "trained by full" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    export_merged(folders["ia3"], tmp_path / "ia3")
    with pytest.raises(AdapterError, match="bottleneck adapters have a nonlinearity"):
        export_merged(folders["houlsby-w2"], tmp_path / "no")
    with pytest.raises(AdapterError, match="cannot be merged"):
        export_merged(folders["prompt_tuning-n3"], tmp_path / "no")
    for label, family in (("full", "full"), ("houlsby-w2", "houlsby")):
        with pytest.raises(AdapterError, match=rf"is no LoRA adapter \({family}\)"):
            export_uniform(folders[label], tmp_path / "no")
    assert not (tmp_path / "no").exists()
