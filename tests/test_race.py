"""Racing rates: stopped by recorded losses alone, survivors bit for bit, never compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from synthetic_study import failed, study, trial
from tracked import Finished, quiet, runs_in, store_in, trials_in, words_of
from zygote import Zygote

from adaptive_lora.analysis.comparison import compare
from adaptive_lora.analysis.stats import RACE_RULE, RaceRule, nearest_passes
from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, load_study, study_from
from adaptive_lora.errors import ConfigError
from adaptive_lora.results import RACED_STATUS, TrialRecord
from adaptive_lora.runner.race import loss_at, rungs_of

Make = Callable[..., StudyConfig]
HALF = RaceRule(seeds=None, kept=(0.5, 0.5), level=0.01)
NAN, INF = math.nan, math.inf


def by_seed(*losses: float) -> dict[int, float]:
    return dict(enumerate(losses))


class TestRule:
    """Which rates go on, from losses alone."""

    def test_half_of_the_rates_goes_on_and_two_unless_one_is_clearly_behind(self) -> None:
        losses = {
            1e-3: by_seed(3.0, 3.4), 3e-3: by_seed(2.0, 2.5), 1e-2: by_seed(2.1, 2.3),
            3e-2: by_seed(2.6, 2.7), 1e-1: by_seed(9.0, 8.0),
        }  # fmt: skip
        assert HALF.survivors(losses, 0) == (3e-3, 1e-2)
        two = {lr: losses[lr] for lr in (3e-3, 1e-2)}
        assert HALF.survivors(two, 1) == (3e-3, 1e-2)
        far = {3e-3: by_seed(2.0, 2.5, 2.1), 1e-2: by_seed(9.0, 9.6, 9.2)}
        assert HALF.survivors(far, 1) == (3e-3,)
        assert HALF.survivors({1e-2: losses[1e-2]}, 1) == (1e-2,)

    def test_what_is_clearly_behind_goes_at_once(self) -> None:
        near = {1e-2: by_seed(2.0, 3.0, 2.5, 1.0), 2e-2: by_seed(2.1, 2.9, 2.7, 1.0)}
        far = {1e-2: by_seed(2.0, 3.0, 2.5, 1.0), 2e-2: by_seed(2.2, 3.2, 2.7, 1.201)}
        rule = RaceRule(seeds=None, kept=(1.0,), level=0.01)
        assert rule.survivors(near, 0) == (1e-2, 2e-2)
        assert rule.survivors(far, 0) == (1e-2,)
        assert RaceRule(seeds=None, kept=(1.0,), level=0.0).survivors(far, 0) == (1e-2, 2e-2)

    def test_one_seed_has_no_paired_test(self) -> None:
        rule = RaceRule(seeds=None, kept=(1.0,), level=0.05)
        assert rule.survivors({1e-2: by_seed(1.0), 2e-2: by_seed(7.0)}, 0) == (1e-2, 2e-2)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_failed_rates_go_first(self, bad: float) -> None:
        losses = {1e-3: by_seed(5.0, 5.0), 1e-2: by_seed(1.0, bad), 1e-1: by_seed(bad, bad)}
        assert HALF.survivors(losses, 0) == (1e-3,)
        all_bad = {1e-2: by_seed(bad, bad), 1e-1: by_seed(bad, bad)}
        assert HALF.survivors(all_bad, 0) == (1e-2,)  # to fail in full, and be told

    def test_the_lower_rates_win_a_tie(self) -> None:
        losses = {lr: by_seed(2.0, 3.0) for lr in (3e-2, 1e-2, 1e-3)}
        assert HALF.survivors(losses, 0) == (1e-3, 1e-2)

    @given(
        st.lists(st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0, NAN]), min_size=3, max_size=3), min_size=2, max_size=5),
        st.randoms(),
    )
    def test_no_order_matters(self, losses: list[list[float]], draw: Any) -> None:
        table = {10.0**-n: by_seed(*own) for n, own in enumerate(losses)}
        rates = list(table)
        draw.shuffle(rates)
        mixed = {lr: dict(sorted(table[lr].items(), key=lambda _: draw.random())) for lr in rates}
        assert HALF.survivors(mixed, 0) == HALF.survivors(table, 0)

    def test_the_lowest_seeds_race(self) -> None:
        assert HALF.racing((5, 1, 3)) == (1, 3, 5)
        assert RaceRule(seeds=2, kept=(0.5,), level=0.0).racing((5, 1, 3)) == (1, 3)


class TestRungs:
    """Where rates are judged."""

    def test_rungs_are_the_passes_nearest_to_the_thirds(self) -> None:
        assert rungs_of(120, 3) == rungs_of(120, 6) == (40, 80)
        assert rungs_of(100, 5) == (40, 60)
        assert rungs_of(7, 3) == (3, 5)
        assert rungs_of(120, 6, trainings=2) == (80, 160)
        assert rungs_of(2, 3) == (1,)
        assert rungs_of(1, 3) == ()
        assert nearest_passes((), 10) == ()

    def test_early_stopping_judges_by_the_best_pass(self) -> None:
        curve = {2: 3.0, 4: 1.0, 6: 2.0}
        assert loss_at(curve, 6, since=None) == 2.0
        assert loss_at(curve, 6, since=0) == 1.0
        assert loss_at(curve, 9, since=0) == 1.0  # it ended before
        assert loss_at(curve, 9, since=None) == INF
        assert loss_at(curve, 6, since=4) == 2.0  # of the second training alone


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": "1e-2"}, "race: required at least two learning rates"),
        ({"engine": "together"}, "race: trials together cannot be stopped one by one"),
        ({"validations": 2}, "required validations of at least 3, got 2"),
        ({"race": "maybe"}, "expected true or false"),
    ],
)
def test_bad_input(options: dict[str, object], changes: dict[str, object], says: str) -> None:
    values = {**options, "lr": "1e-3 1e-2", "validations": 3, "race": True, **changes}
    with pytest.raises(ConfigError, match=says):
        study_from(values)
    result = CliRunner().invoke(main, ["study", *words_of(values)])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_training_without_a_pass_on_the_way_is_refused_before_anything_is_written(
    in_store: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="trained for 1 step, without a validation pass"):
        quiet(in_store(lr="1e-3 1e-2", validations=3, max_steps=1, race=True))
    assert not runs_in(tmp_path)


def test_the_option_needs_no_value_and_is_no_part_of_identity(options: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("race: true\nlr: [1e-3, 1e-2]\n")
    assert load_study(tmp_path / "study.yaml", {}).race
    values = {**options, "lr": "1e-3 1e-2", "validations": 3}
    for words, on in (["--race"], True), (["--race", "true"], True), (["--race=false"], False):
        one_rate = words_of({**values, "lr": "1e-2", "baseline": "nobody"})
        result = CliRunner().invoke(main, ["study", *words, *one_rate])
        assert "unknown baseline" in result.output
        assert ("race: required at least two learning rates" in result.output) is on
    raced, plain = study_from({**values, "race": True}), study_from(values)
    one, other = next(raced.trials()), next(plain.trials())
    assert one.signature({}) == other.signature({})
    assert raced.identity() == plain.identity()


GRID: dict[str, object] = {
    "methods": "uniform:rank=2 truncate_retrain:rank=2", "seeds": "0 1",
    "lr": "1e-4 1e-3 1e-2 3e-2", "max_steps": 6, "epochs": 9, "validations": 3, "dropout": 0.1,
    "experiment": "adaptive-lora",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(
    base_folder: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, object]]]:
    """Return a function that makes a folder with a store, and the options of a study in it."""
    from conftest import rows

    def make(**changes: object) -> tuple[Path, dict[str, object]]:
        folder = tmp_path_factory.mktemp("race")
        shutil.copy(empty_store, folder / "mlflow.db")
        (folder / "rows.json").write_text(json.dumps(rows(40)), encoding="utf-8")
        values = {
            "model": str(base_folder), "data": str(folder / "rows.json"), "template": "compact",
            "max_tokens": 120, "batch_size": 4, "generate": "off", "precision": "fp32",
            "tracking_uri": store_in(folder), "output": str(folder / "out"), **GRID, **changes,
        }  # fmt: skip
        return folder, values

    return make


Place = Callable[..., tuple[Path, dict[str, object]]]


def finish(folder: Path, values: dict[str, object]) -> Finished:
    config = study_from(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome, shown = quiet(config)
    return Finished(folder=folder, config=config, outcome=outcome, shown=shown)


@pytest.fixture(scope="module")
def raced(place: Place) -> Finished:
    return finish(*place(race=True))


@pytest.fixture(scope="module")
def full(place: Place) -> Finished:
    return finish(*place())


def key(run: Run) -> tuple[str, str, float]:
    return run.data.tags["method"], run.data.tags["seed"], float(run.data.tags["lr"])


def read(client: MlflowClient, run: Run, name: str) -> Any:
    return json.loads(Path(client.download_artifacts(run.info.run_id, name)).read_text())


def record(folder: Path) -> dict[tuple[str, str, float], Any]:
    """Return everything of finished trials that must be the same, to the last bit."""
    client = MlflowClient(store_in(folder))
    found = {}
    for run in trials_in(folder):
        if run.info.status != "FINISHED":
            continue
        curves = {
            name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
            for name in ("train/loss", "train/tokens", "validation/loss")
        }
        own: dict[str, Any] = {"curves": curves}
        own["weights"] = weights(client, run, store_in(folder))
        own |= {name: read(client, run, name) for name in ("trial.json", "rank_plan.json")}
        own["signature"] = run.data.tags["trial_signature"]
        found[key(run)] = own
    return found


def weights(client: MlflowClient, run: Run, uri: str) -> str:
    """Return the digest of a trial's adapter as the store has it."""
    model = client.get_logged_model(run.data.tags["adapter_model_uri"].split("/")[-1])
    where = get_artifact_repository(model.artifact_location, tracking_uri=uri)
    (file,) = Path(where.download_artifacts("")).rglob("adapter_model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def decisions(folder: Path) -> Any:
    (parent,) = [run for run in runs_in(folder) if run.data.tags.get("adaptive_lora.kind") == "study"]
    return read(MlflowClient(store_in(folder)), parent, "race.json")


class TestStudy:
    """One study that raced beside the same one that did not."""

    def test_survivors_are_bit_for_bit_those_of_the_full_grid(self, raced: Finished, full: Finished) -> None:
        found, expected = record(raced.folder), record(full.folder)
        assert raced.outcome.study_result.study_id == full.outcome.study_result.study_id
        assert len(expected) == 16
        assert 4 <= len(found) < 16
        assert found == {trial: expected[trial] for trial in found}

    def test_raced_trials_end_as_such(self, raced: Finished) -> None:
        statuses = Counter((r.info.status, r.data.tags.get("race")) for r in raced.children)
        assert set(statuses) == {("FINISHED", None), ("FINISHED", ""), ("KILLED", "raced")} & set(statuses)
        for run in raced.children:
            if run.info.status == "KILLED":
                step = int(run.data.tags["race.step"])
                reason = run.data.tags["race.reason"]
                assert reason.startswith(f"stopped at step {step} of ")
                assert RACE_RULE.text in reason
                assert "trial.json" not in [item.path for item in raced.client.list_artifacts(run.info.run_id)]

    def test_they_are_never_compared_or_counted_as_failed(self, raced: Finished) -> None:
        comparison = raced.outcome.study_result.comparison
        assert comparison.failed_trials == 0
        assert comparison.raced_rates == sum(bool(r.raced) for m in comparison.methods for r in m.rates)
        for method in comparison.methods:
            assert [rate.lr for rate in method.rates] == [1e-4, 1e-3, 1e-2, 3e-2]
            for rate in method.rates:
                if rate.raced:
                    assert not rate.chosen
                    assert rate.test.mean is rate.validation.mean is None
                    assert rate.test.note == "stopped by the race"
        (entry,) = [entry for entry in comparison.audit if entry.topic == "race"]
        assert "one rule for all methods" in entry.text
        edge = [e for e in comparison.audit if e.topic == "tuning" and "of the grid" in e.text]
        best = {method.lr for method in comparison.methods}
        assert bool(edge and "better one may lie outside" in edge[0].text) == (3e-2 in best)

    def test_the_report_lists_them(self, raced: Finished) -> None:
        text = raced.outcome.study_result.report().with_suffix(".md").read_text()
        assert "stopped at step" in text
        assert "successive halving" in text

    def test_steps_are_counted(self, raced: Finished) -> None:
        client = raced.client
        taken = {}
        for run in raced.children:
            points = client.get_metric_history(run.info.run_id, "train/tokens")
            assert sorted(p.step for p in points) == list(range(1, len(points) + 1))
            taken[key(run)] = len(points)
        metrics = raced.parent.data.metrics
        grid = 2 * 4 * (6 + 12)
        assert metrics["race/full_grid_steps"] == grid
        assert metrics["race/trained_steps"] == sum(taken.values()) < 0.7 * grid
        assert metrics["race/share_of_full_grid"] == sum(taken.values()) / grid
        line = f"race   {sum(taken.values())} of {grid} optimiser steps of the full grid trained"
        assert line in raced.shown

    def test_the_same_command_again_trains_nothing(self, raced: Finished) -> None:
        before = record(raced.folder)
        again = finish(raced.folder, {**raced.config.flat(), "tracking_uri": store_in(raced.folder)})
        assert again.outcome.trials_run == 0
        assert record(raced.folder) == before
        assert "stopped by the race; 0 to run" in again.shown
        assert not (raced.folder / "out" / "checkpoints").exists()

    def test_compare_reads_it_from_the_store_alone(self, raced: Finished, tmp_path: Path) -> None:
        words = ["compare", "--json", f"--tracking-uri={store_in(raced.folder)}", "--output=o"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout[: result.stdout.rindex("}") + 1])
        assert found["raced_rates"] == raced.outcome.study_result.comparison.raced_rates


def test_without_the_option_the_grid_is_finished(place: Place, full: Finished) -> None:
    folder, values = place(race=True, methods="uniform:rank=2", seeds="0")
    finish(folder, values)
    some = len(record(folder))
    ended = finish(folder, {**values, "race": False})
    assert ended.outcome.trials_run == 4 - some > 0
    expected = record(full.folder)
    found = record(folder)
    assert len(found) == 4
    assert found == {name: expected[name] for name in found}
    assert not [run for run in ended.children if run.data.tags.get("race")]
    assert ended.outcome.study_result.comparison.raced_rates == 0


def test_no_order_of_trials_matters(raced: Finished, place: Place) -> None:
    folder, values = place(race=True, methods="uniform:rank=2", seeds="1 0", lr="3e-2 1e-4 1e-2 1e-3")
    finish(folder, values)
    assert decisions(folder)["rule"] == decisions(raced.folder)["rule"]
    check_same("uniform-r2", folder, raced)


def of_method(label: str, found: dict[Any, Any]) -> dict[Any, Any]:
    return {name: own for name, own in found.items() if label in (name, name[0])}


def check_same(label: str, folder: Path, raced: Finished) -> None:
    """Compare a method's race with the one in the shared study."""
    assert decisions(folder)["methods"][label] == decisions(raced.folder)["methods"][label]
    assert record(folder) == of_method(label, record(raced.folder))


def test_other_seeds_are_trained_at_the_rates_that_are_left(
    full: Finished, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = dataclasses.replace(RACE_RULE, seeds=1)
    monkeypatch.setattr("adaptive_lora.runner.race.run.RACE_RULE", rule)
    folder, values = place(race=True, methods="uniform:rank=2")
    ended = finish(folder, values)
    left = decisions(folder)["methods"]["uniform-r2"]["left"]
    assert len(left) == 2
    tried = {seed: {lr for _, own, lr in map(key, ended.children) if own == seed} for seed in "01"}
    assert tried == {"0": {1e-4, 1e-3, 1e-2, 3e-2}, "1": set(left)}
    expected = record(full.folder)
    found = record(folder)
    assert found == {name: expected[name] for name in found}
    assert set(found) == {("uniform-r2", seed, lr) for seed in "01" for lr in left}
    metrics = ended.parent.data.metrics
    assert metrics["race/trained_steps"] == 4 * 6 + 2 * 2
    assert metrics["race/full_grid_steps"] == 8 * 6


def test_more_seeds_and_rates_end_as_if_the_study_had_begun_with_them(raced: Finished, place: Place) -> None:
    folder, values = place(race=True, methods="uniform:rank=2")
    finish(folder, {**values, "seeds": "0", "lr": "1e-4 1e-2"})
    finish(folder, {**values, "seeds": "0", "lr": "1e-4 1e-3 1e-2 3e-2"})
    ended = finish(folder, values)
    assert decisions(folder)["methods"]["uniform-r2"] == (decisions(raced.folder)["methods"]["uniform-r2"])
    expected = of_method("uniform-r2", record(raced.folder))
    found = record(folder)
    assert {name: found[name] for name in expected} == expected
    method, shared = ended.outcome.study_result.comparison, raced.outcome.study_result.comparison
    assert method.method("uniform-r2").lr == shared.method("uniform-r2").lr


FAULTS = (
    ("adaptive_lora.runner.trial", "log_step", 6, "before"),
    ("adaptive_lora.training.checkpoint_files", "_write_files", 2, "after"),
    ("adaptive_lora.tracking.recorder", "Recorder.end", 1, "before"),
    ("adaptive_lora.tracking.recorder", "Recorder.end", 1, "after"),
    ("adaptive_lora.runner.race.decide", "Race.look", 2, "before"),
    ("adaptive_lora.tracking.study_run", "StudyRun.end_raced", 1, "before"),
    ("adaptive_lora.tracking.study_run", "StudyRun.end_raced", 1, "after"),
    ("adaptive_lora.runner.race.run", "_record_steps", 1, "before"),
)


def test_a_killed_race_ends_as_if_it_had_not_been(raced: Finished, place: Place, zygote: Zygote) -> None:
    label = "truncate_retrain-r2"
    folder, values = place(race=True, methods="truncate_retrain:rank=2")
    words = ["study", *words_of(values)]
    killed = [zygote.run(words, folder, fault) for fault in FAULTS]
    assert killed == [-9] * len(FAULTS), (folder / "log.txt").read_text()[-4000:]
    assert zygote.run(words, folder) == 0, (folder / "log.txt").read_text()[-4000:]
    check_same(label, folder, raced)
    parent = next(r for r in runs_in(folder) if r.data.tags.get("adaptive_lora.kind") == "study")
    client = raced.client
    steps = [
        max(point.step for point in client.get_metric_history(run.info.run_id, "train/tokens"))
        for run in raced.children
        if run.data.tags["method"] == label
    ]
    assert parent.data.metrics["race/trained_steps"] == sum(steps)
    assert parent.data.metrics["race/full_grid_steps"] == 2 * 4 * 12
    assert not (folder / "out" / "checkpoints").exists()


def test_ctrl_c_and_continue(raced: Finished, place: Place, zygote: Zygote) -> None:
    folder, values = place(race=True, methods="uniform:rank=2")
    words = ["study", *words_of(values)]
    fault = ("adaptive_lora.runner.trial", "log_step", 15, "after", 2)
    assert zygote.run(words, folder, fault) == 130
    assert zygote.run(words, folder) == 0, (folder / "log.txt").read_text()[-4000:]
    check_same("uniform-r2", folder, raced)


@pytest.mark.parametrize(("warmup", "status"), [(0.0, "FAILED"), (0.1, "KILLED")])
def test_a_rate_that_diverges_goes_first_and_is_not_tried_again(place: Place, warmup: float, status: str) -> None:
    """Without warm-up the guard ends its trials before the rung; with it, their loss there is NaN.

    The first step of a warm-up has a rate of zero.
    """
    folder, values = place(race=True, methods="uniform:rank=2", seeds="0 1", lr="1e-2 1e38")
    values |= {"max_skipped_steps": 0, "warmup_share": warmup}
    first = finish(folder, values)
    statuses = {key(run): run.info.status for run in first.children}
    assert {statuses["uniform-r2", seed, 1e38] for seed in "01"} == {status}
    assert statuses["uniform-r2", "0", 1e-2] == "FINISHED"
    comparison = first.outcome.study_result.comparison
    assert comparison.methods[0].lr == 1e-2
    assert comparison.failed_trials == (2 if status == "FAILED" else 0)
    (rung, *_) = decisions(folder)["methods"]["uniform-r2"]["rungs"]
    diverged = next(rate for rate in rung["rates"] if rate["lr"] == 1e38)
    assert diverged == {"lr": 1e38, "validation_loss": None, "failed_seeds": 2}
    assert 1e38 not in rung["kept"]
    assert finish(folder, values).outcome.trials_run == 0


def test_folds_and_early_stopping(place: Place) -> None:
    changes = {"methods": "uniform:rank=2", "seeds": "0", "lr": "1e-4 1e-2 3e-2", "folds": 2, "patience": 1}
    folder, values = place(race=True, **changes, validations=6)
    finish(folder, values)
    other, plain = place(**changes, validations=6)
    finish(other, plain)
    expected = record_by_fold(other)
    found = record_by_fold(folder)
    assert found
    assert found == {name: expected[name] for name in found}


def record_by_fold(folder: Path) -> dict[Any, Any]:
    client = MlflowClient(store_in(folder))
    return {
        (key(run), run.data.tags["fold"]): read(client, run, "trial.json")
        for run in trials_in(folder)
        if run.info.status == "FINISHED"
    }


def raced_trial(seed: int, lr: float) -> TrialRecord:
    record = failed("uniform-r4", seed, "stopped at step 2 of 6: x", lr=lr)
    return dataclasses.replace(record, status=RACED_STATUS)


class TestComparison:
    """Records alone: a raced rate is out, whatever finished beside it."""

    def test_a_raced_rate_with_the_best_numbers_is_not_chosen(self) -> None:
        records = study({"uniform-r8": 0.0, "uniform-r4": 0.1}, rates=(1e-4, 3e-4, 9e-4))
        out = [trial("uniform-r4", seed, 0.1, lr=1e-4) if seed < 5 else raced_trial(seed, 1e-4) for seed in range(6)]
        kept = [r for r in records if (r.method, r.lr) != ("uniform-r4", 1e-4)]
        comparison = compare([*kept, *out], baseline="uniform-r8")
        method = comparison.method("uniform-r4")
        assert method.lr == 3e-4
        assert not method.failures
        assert comparison.failed_trials == 0
        assert comparison.raced_rates == 1
        (entry,) = [entry for entry in comparison.audit if entry.topic == "race"]
        assert entry.kind == "bad"  # the other method was not raced
        assert "uniform-r8: 0 of 3; uniform-r4: 1 of 3" in entry.text

    def test_a_shared_rate_that_was_raced_gives_no_pair(self) -> None:
        records = study({"uniform-r8": 0.0, "uniform-r4": 0.1}, rates=(3e-4, 9e-4))
        kept = [r for r in records if (r.method, r.lr) not in {("uniform-r4", 9e-4)}]
        raced = [raced_trial(seed, 9e-4) for seed in range(6)]
        comparison = compare([*kept, *raced], baseline="uniform-r8")
        assert comparison.methods[0].lr == 9e-4
        assert comparison.method("uniform-r4").shared_rate is None
        assert comparison.method("uniform-r4").difference is not None
