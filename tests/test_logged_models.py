"""What the tracking UI shows of a study: logged models with metrics, links to versions, and the comparison's table."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.models import Model
from tracked import Finished

from adaptive_lora.analysis.comparison.wording import signed
from adaptive_lora.config import TrackingConfig
from adaptive_lora.tracking import Recorder, connect
from adaptive_lora.tracking.registry import MODEL_TAG
from adaptive_lora.tracking.uploader import model_name


def models_of(finished: Finished) -> dict[str, LoggedModel]:
    """Return the id of the source run -> logged model."""
    found = finished.client.search_logged_models([finished.outcome.store.experiment_id])
    return {model.source_run_id: model for model in found}


def test_every_trial_has_a_model_with_its_settings_and_scores(finished: Finished) -> None:
    models = models_of(finished)
    assert models.keys() == {run.info.run_id for run in finished.children}
    for run in finished.children:
        model, tags = models[run.info.run_id], run.data.tags
        assert tags[MODEL_TAG] == model.model_uri
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
        assert model.name == f"{tags['method']}·seed{tags['seed']}·lr0_002"
        assert {key: model.params[key] for key in ("method", "seed", "fold", "lr")} == {
            key: tags[key] for key in ("method", "seed", "fold", "lr")
        }
        assert model.tags["trial_signature"] == tags["trial_signature"]
        (tested,) = [one.dataset for one in run.inputs.dataset_inputs if one.tags[0].value == "test"]
        for metric in model.metrics:
            assert metric.value == run.data.metrics[metric.key]
            of = (metric.dataset_name, metric.dataset_digest)
            assert of == ((tested.name, tested.digest) if metric.key.startswith("test/") else (None, None))
        scores = {key for key in run.data.metrics if key.startswith("test/")}
        assert {metric.key for metric in model.metrics} == scores | {"validation/final_loss", "trainable_parameters"}
        history = finished.client.get_metric_history(run.info.run_id, "test/loss")
        assert len(history) == 1  # the model's metric is the run's


def test_models_are_ranked_by_a_score_on_the_test_data(finished: Finished) -> None:
    ranked = finished.client.search_logged_models(
        [finished.outcome.store.experiment_id],
        order_by=[{"field_name": "metrics.test/loss", "ascending": True, "dataset_name": "rows.json·test"}],
    )
    losses = [finished.client.get_run(model.source_run_id).data.metrics["test/loss"] for model in ranked]
    assert losses == sorted(losses)
    best = finished.client.search_logged_models(
        [finished.outcome.store.experiment_id], "params.seed = '1' and metrics.`trainable_parameters` > 0"
    )
    assert len(best) == 2


def test_the_version_and_its_model_are_linked_both_ways(finished: Finished) -> None:
    version = finished.client.get_model_version_by_alias("adaptive-lora", "champion")
    model = models_of(finished)[version.run_id]
    assert version.source == model.model_uri
    assert Model.load(model.artifact_location).model_id == model.model_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "adaptive-lora", "version": "1"}]


def test_the_comparison_is_a_table_of_the_study(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    # `load_table` searches the process's own store, whatever the client's is.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", finished.client.tracking_uri)
    tags = finished.parent.data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "comparison_table.json", "type": "table"}]
    run = finished.parent.info
    table = finished.client.load_table(run.experiment_id, "comparison_table.json", [run.run_id])
    assert list(table.columns[:2]) == ["Method", "Test loss"]
    comparison = finished.outcome.study_result.comparison
    assert list(table["Method"]) == [method.label for method in comparison.methods]
    for method, text in zip(comparison.methods, table["Test loss"], strict=True):
        assert text.startswith(f"{method.loss.mean:.4f} ")
        assert method.difference is None or signed(method.difference.mean) in set(table["Difference"])
    assert {"95 % interval", "Verdict", "Parameters", "Learning rate"} <= set(table.columns)


def test_a_table_is_named_once_beside_those_of_others(own_store: str) -> None:
    store = connect(TrackingConfig(tracking_uri=own_store))
    run = Recorder.begin(store, "run", {})
    assert run.flush(60)
    store.client.log_table(run.run_id, {"a": [1]}, "theirs.json")
    for value in ("before", "after"):
        run.table("ours.json", ["a"], [[value]])
    assert run.flush(60)
    named = json.loads(store.client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"])
    assert [one["path"] for one in named] == ["theirs.json", "ours.json"]
    assert store.read_json(run.run_id, "ours.json") == {"columns": ["a"], "data": [["after"]]}
    store.client.set_tag(run.run_id, "mlflow.loggedArtifacts", "no JSON")
    run.table("again.json", ["a"], [["b"]])
    assert run.flush(60)
    assert "again.json" in store.client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"]
    store.close()


def test_names_hold_no_character_that_mlflow_forbids(own_store: str) -> None:
    name = model_name("a/b:c.d%e\"f'g·é@h")
    assert name == "a_b_c_d_e_f_g·é@h"
    assert MlflowClient(own_store).create_logged_model("0", name=name).name == name
