"""`power`: seeds and examples from an assumed spread, and from a finished study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from synthetic_study import FROZEN_LOSS, scores, study
from tracked import Finished

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import compare
from adaptive_lora.cli import main
from adaptive_lora.errors import ConfigError, DataError
from adaptive_lora.runner.power import assumed_noise, difference_of_interest, observed_noise


def power(*words: object) -> Result:
    return CliRunner().invoke(main, ["power", *map(str, words)])


def test_an_assumed_spread_gives_the_published_number_of_seeds() -> None:
    result = power("--difference", 0.5, "--spread", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    # G*Power 3.1 (Faul et al. 2007), paired t test, d_z = 0.5, two-sided 5 %, power 0.8: n = 34.
    assert found["seeds_needed"] == 34
    assert found["simulated_power"] == pytest.approx(0.8, abs=0.06)
    assert found["least_seeds"] == 6
    rows = {row["seeds"]: row for row in found["by_seeds"]}
    assert rows[5]["simulated"] == rows[5]["power"] == 0.0
    assert rows[20]["power"] == pytest.approx(stats.paired_power(0.5, 1.0, 20))
    assert rows[20]["simulated"] == pytest.approx(rows[20]["power"], abs=0.06)
    assert found["by_examples"] == []
    many = json.loads(power("--difference", 0.5, "--spread", 1, "--comparisons", 5, "--json").output)
    assert many["seeds_needed"] == stats.seeds_for_power(0.5, 1.0, alpha=0.01)
    assert many["least_seeds"] == 8


def test_examples_are_weighed_against_seeds() -> None:
    words = ("--difference", 0.01, "--spread", 0.02, "--example-spread", 0.15, "--examples", 100)
    found = json.loads(power(*words, "--json").output)
    by_examples = {row["examples"]: row for row in found["by_examples"]}
    assert by_examples[100]["spread"] == pytest.approx(0.02)
    # 0.02^2 = seed + 0.15^2 / 100, so 400 examples leave sqrt(0.000175 + 0.0225 / 400).
    assert by_examples[400]["spread"] == pytest.approx((0.000175 + 0.0225 / 400) ** 0.5)
    assert by_examples[400]["seeds_needed"] < by_examples[100]["seeds_needed"]
    for row in found["by_seeds"]:
        if row["examples_needed"] is not None:
            spread = (0.000175 + 0.0225 / row["examples_needed"]) ** 0.5
            assert stats.paired_power(0.01, spread, row["seeds"]) >= 0.8
    shown = power(*words).output
    assert "test examples" in shown
    assert "not enough seeds" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "got neither"),
        (("--spread", 1, "--study-id", "x"), "got both"),
        (("--spread", 1), "needs --difference"),
        (("--spread", 1, "--difference", 1, "--example-spread", 1), "needs --examples"),
        (("--spread", 0.01, "--difference", 1, "--example-spread", 1, "--examples", 10), "raise --spread"),
        (("--spread", -1, "--difference", 1), "not in the range"),
        (("--study-id", "nobody"), "no study nobody"),
    ],
)
def test_bad_questions_exit_with_2(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(finished.folder)
    result = power(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_finished_study_answers_from_what_it_saw(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    before = sorted(path.name for path in Path().iterdir())
    study_id = finished.outcome.study_result.study_id
    result = power("--study-id", study_id, "--gain-percent", 50, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    comparison = finished.outcome.study_result.comparison
    base, method = comparison.methods
    assert found["question"]["difference"] == pytest.approx((comparison.frozen_loss - base.loss.mean) / 2)
    parts = found["question"]["components"]
    spread = (parts["seed"] + parts["residual"] / parts["examples"]) ** 0.5
    assert spread >= method.difference.sd * (1 - 1e-9)  # equal but where a component is 0
    assert found["question"]["source"] == f"observed in {study_id}, 2 seeds"
    assert power("--study-id", "latest", "--difference", 0.1).exit_code == 0
    assert sorted(path.name for path in Path().iterdir()) == before  # it writes nothing


def test_observed_noise_and_difference_of_a_comparison() -> None:
    records = study({"uniform-r8": 0.0, "m-r8": 0.01}, range(6), noise=0.02)
    comparison = compare(records, baseline="uniform-r8", base_scores=scores(FROZEN_LOSS, 0))
    difference = comparison.methods[1].difference
    assert difference is not None
    assert observed_noise(comparison).standard_deviation(40) == pytest.approx(difference.sd)
    assert difference_of_interest(comparison, None, None) == comparison.margin.value
    assert difference_of_interest(comparison, 0.3, 5.0) == 0.3
    base = comparison.methods[0].loss.mean
    assert difference_of_interest(comparison, None, 5.0) == pytest.approx(0.05 * (FROZEN_LOSS - base))
    unknown = compare(records, baseline="uniform-r8")
    with pytest.raises(ConfigError, match="gain-percent"):
        difference_of_interest(unknown, None, 5.0)
    with pytest.raises(ConfigError, match="no margin"):
        difference_of_interest(unknown, None, None)
    with pytest.raises(DataError, match="no spread"):
        observed_noise(compare(study({"uniform-r8": 0.0, "m-r8": 0.0}, [0]), baseline="uniform-r8"))
    assert assumed_noise(0.2, seeds=0, examples=1, example_spread=None).standard_deviation(9) == 0.2
