"""Comparing trials that others ran: from the store alone, several studies, queries, mixing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import rows
from rich.console import Console
from tracked import Finished, quiet, runs_in, store_in

from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, TrackingConfig
from adaptive_lora.errors import ConfigError, DataError, TrackingError
from adaptive_lora.runner.comparison_input import Selection
from adaptive_lora.runner.result import StudyResult
from adaptive_lora.runner.run import compare_study


def compare_in(folder: Path, selection: Selection, **changes: object) -> StudyResult:
    """Compare what is in the store of a folder, as somebody without base and data would."""
    tracking = TrackingConfig(tracking_uri=store_in(folder))
    given = {"output": "elsewhere", **changes}
    return compare_study(tracking, selection, given, Console(file=io.StringIO(), width=160))[0]


def test_without_base_and_data_all_but_the_registration_is_there(
    in_store: Callable[..., StudyConfig], tmp_path: Path, data_file: Path
) -> None:
    before, _ = quiet(in_store(methods="uniform:rank=2 uniform:rank=1", seeds="0 1"))
    assert before.study_result.champion is not None
    data_file.unlink()
    again = compare_in(tmp_path, Selection())
    assert again.champion is None
    assert "not available here" in again.no_champion
    assert "rows.json" in again.no_champion
    assert again.comparison.to_dict() == before.study_result.comparison.to_dict()
    page = again.report().read_text(encoding="utf-8")
    assert "Swap" in page  # the texts of changed examples come from the store


def test_other_data_under_the_same_name_are_not_taken_for_the_same(
    in_store: Callable[..., StudyConfig], tmp_path: Path, data_file: Path
) -> None:
    quiet(in_store())
    data_file.write_text(json.dumps(rows(40, seed=5)), encoding="utf-8")
    again = compare_in(tmp_path, Selection())
    assert again.champion is None
    assert "the data available here differs" in again.no_champion


def test_several_studies_and_a_query_give_one_comparison(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    mine, _ = quiet(in_store(study="mine", seeds="0 1"))
    theirs, _ = quiet(in_store(study="theirs", seeds="0 1", methods="uniform:rank=1"))
    ids = (mine.study_result.study_id, theirs.study_result.study_id)
    both = compare_in(tmp_path, Selection(study_ids=ids))
    assert [m.label for m in both.comparison.methods] == ["uniform-r2", "uniform-r1"]
    assert both.comparison.methods[1].difference is not None
    assert both.comparison.frozen_loss == pytest.approx(mine.study_result.comparison.frozen_loss)
    assert both.champion is not None
    assert all(study_id in both.comparison.facts["study id"] for study_id in ids)
    (home,) = [run for run in runs_in(tmp_path) if run.data.tags.get("adaptive_lora.kind") == "comparison"]
    assert home.data.tags["mlflow.note.content"].startswith("# Comparison")
    assert compare_in(tmp_path, Selection(study_ids=ids)).study_id == both.study_id
    assert len(runs_in(tmp_path)) == 7  # the same comparison again adds no run

    query = Selection(query="tags.seed = '0'")
    with pytest.raises(DataError, match="unknown baseline"):
        compare_in(tmp_path, query, baseline="uniform-r3")
    found = compare_in(tmp_path, query, baseline="uniform-r1")
    assert [m.label for m in found.comparison.methods] == ["uniform-r1", "uniform-r2"]
    assert found.comparison.methods[0].seeds == (0,)
    with pytest.raises(TrackingError, match="no trial"):
        compare_in(tmp_path, Selection(query="tags.seed = '7'"))
    with pytest.raises(TrackingError, match="Required MLflow's syntax"):
        compare_in(tmp_path, Selection(query="seed is 7"))


def test_other_data_and_splits_are_refused_by_name_unless_told(
    in_store: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows(40, seed=3)), encoding="utf-8")
    grid = {"methods": "uniform:rank=2 uniform:rank=1", "seeds": "0 1"}
    one, _ = quiet(in_store(**grid))
    two, _ = quiet(in_store(**grid, data=str(other), split_seed=4))
    ids = (one.study_result.study_id, two.study_result.study_id)
    with pytest.raises(DataError, match="allow-mixed") as caught:
        compare_in(tmp_path, Selection(study_ids=ids))
    assert "data digest differs" in str(caught.value)
    assert "split_seed 0" in str(caught.value)
    assert ids[0] in str(caught.value)
    mixed = compare_in(tmp_path, Selection(study_ids=ids, allow_mixed=True))
    difference = mixed.comparison.methods[1].difference
    assert difference is not None
    assert difference.seeds == (0, 1, 10_000, 10_001)
    alone = [o.study_result.comparison.methods[1].difference for o in (one, two)]
    assert difference.values == (*alone[0].values, *alone[1].values)
    assert mixed.champion is None
    assert "no one adapter" in mixed.no_champion
    assert any("pooled as asked" in note for note in mixed.comparison.notes)
    assert any("Under each seed all trials have the same data digest, of 2" in e.text for e in mixed.comparison.audit)
    assert not any("data digest" in finding for finding in mixed.comparison.fairness)


def test_a_query_without_a_recorded_study_needs_a_baseline(
    in_store: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    outcome, _ = quiet(in_store())
    client = outcome.store.client
    parent = next(r for r in runs_in(tmp_path) if "mlflow.parentRunId" not in r.data.tags)
    client.delete_run(parent.info.run_id)
    with pytest.raises(TrackingError, match="no study"):
        compare_in(tmp_path, Selection())
    with pytest.raises(ConfigError, match="required --baseline, one of: uniform-r2"):
        compare_in(tmp_path, Selection(query="tags.seed = '0'"))
    alone = compare_in(tmp_path, Selection(query="tags.seed = '0'"), baseline="uniform-r2")
    assert alone.comparison.frozen_loss is None
    assert alone.champion is None


def test_compare_takes_ids_repeated_or_with_commas(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    study_id = finished.outcome.study_result.study_id
    for words in (["--study-id", study_id], ["--study-id", f"{study_id},"]):
        result = CliRunner().invoke(main, ["compare", *words, "--output", "by-id"])
        assert result.exit_code == 0, result.output
    missing = CliRunner().invoke(main, ["compare", "--study-id", "nobody"])
    assert missing.exit_code == 2
    assert "no study nobody" in missing.output
