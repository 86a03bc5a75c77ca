"""The ladder: what any allocation at a budget could win, by uniform ranks at more parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic_study import scores, study
from tracked import quiet, words_of

import adaptive_lora as al
from adaptive_lora.analysis.comparison import Comparison, VerdictKind, compare
from adaptive_lora.analysis.comparison.findings import Ladder
from adaptive_lora.analysis.comparison.ladder import ladder_of, with_ladder
from adaptive_lora.analysis.report.loss_figures import ladder as draw
from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.errors import ConfigError

Make = Callable[..., StudyConfig]
BASE = "uniform-r4"


def comparison_of(effects: Mapping[int, float], noise: float = 0.005, seeds: int = 8, **options: object) -> Comparison:
    """Compare uniform ranks whose test losses differ from rank 4's by known effects."""
    labels = {f"uniform-r{rank}": effect for rank, effect in effects.items()}
    records = [
        dataclasses.replace(one, trainable_parameters=10_000 * int(one.method.removeprefix("uniform-r")))
        for one in study({BASE: 0.0, **labels}, range(seeds), noise)
    ]
    return compare(records, baseline=BASE, base_scores=scores(3.0, 0), margin=0.01, **options)


def ladder(effects: Mapping[int, float], noise: float = 0.005) -> Ladder:
    found = ladder_of(comparison_of(effects, noise))
    assert found is not None
    return found


def test_what_the_best_rung_wins_brackets_what_can_be_won() -> None:
    found = ladder({8: -0.05, 16: -0.1, 64: -0.12})
    assert found.best == "uniform-r64"
    assert found.low < 0.12 < found.high
    assert found.low > 0.1
    assert found.text.startswith("uniform-r4 loses 0.1")
    assert found.text.endswith("to uniform-r64: no allocation at this budget can win more.")
    assert [rung.method for rung in found.rungs] == [BASE, "uniform-r8", "uniform-r16", "uniform-r64"]
    assert found.rungs[0].difference is None
    assert all("learning rate" in text for text in found.warnings)  # one rate only


def test_nothing_to_win_says_which_rank_is_enough() -> None:
    found = ladder({2: 0.0, 8: 0.0, 64: 0.0})
    assert found.text.startswith(f"Nothing to win: use uniform-r2. {BASE} is equivalent to uniform-r8 and uniform-r64")
    assert found.text.endswith("uniform-r2 does as well with fewer parameters.")
    assert ladder({2: -0.2, 8: 0.0}).text.startswith("Nothing to win: use uniform-r2.")
    assert ladder({2: 0.2, 8: 0.0}).text.startswith(f"Nothing to win: use {BASE}. {BASE} is equivalent to uniform-r8")


def test_too_few_seeds_are_named() -> None:
    few, enough = (ladder_of(comparison_of({8: -0.1, 16: -0.1}, seeds=seeds)) for seeds in (6, 7))
    assert few.warnings[0] == (
        "With 6 seeds no rung could have been shown to be better: 2 comparisons of rungs need 7 seeds."
    )
    assert "is open: it loses 0.1" in few.text
    assert not [text for text in enough.warnings if "seeds" in text]


def test_what_is_open_keeps_its_bound() -> None:
    found = ladder({8: -0.01, 16: -0.02}, noise=0.2)
    assert "is open" in found.text
    assert f"can win more than {found.high:.4f}" in found.text


def test_a_rung_that_is_worse_than_a_smaller_one_breaks_the_assumption() -> None:
    found = ladder({8: -0.1, 16: -0.02, 64: 0.3})
    assert found.best == "uniform-r8"
    falling = [text for text in found.warnings if "the bound may be too low" in text]
    assert len(falling) == 2
    assert "uniform-r16 is worse than uniform-r8" in falling[0]
    assert "uniform-r64 is worse than uniform-r16" in falling[1]
    assert len([t for t in ladder({8: 0.3}).warnings if f"worse than {BASE}" in t]) == 1


def test_without_a_larger_rung_there_is_no_bracket() -> None:
    assert ladder_of(comparison_of({2: 0.0})) is None


def test_a_comparison_tells_its_ladder_first() -> None:
    found = comparison_of({8: -0.1})
    laddered = with_ladder(found, found)
    assert laddered.headline.startswith(laddered.ladder.text)
    assert laddered.headline.endswith(found.headline)
    alone = with_ladder(comparison_of({}), found)
    assert alone.answer == alone.ladder.text
    assert laddered.to_dict()["ladder"]["best"] == "uniform-r8"
    assert "ladder" not in found.to_dict()
    assert draw(found) is None
    assert draw(laddered) is not None
    without = with_ladder(found, comparison_of({2: 0.0}))
    assert without.ladder is None
    assert without.notes[0].startswith("What there is to win is not known: no rank above uniform-r4 finished")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": "linear_decay", "ladder": "8"}, "required the baseline uniform:rank=R"),
        ({"methods": "uniform:budget=9000", "ladder": "8"}, "required the baseline uniform:rank=R"),
        ({"methods": "uniform:rank=8", "ladder": "8 16"}, "ranks other than the baseline's, which is 8"),
        ({"methods": "uniform:rank=8", "ladder": "2 4"}, "required a rank above the baseline's, which is 8"),
        ({"methods": "uniform:rank=8", "ladder": "16 16"}, "ladder: given more than once: 16"),
        ({"methods": "uniform:rank=8", "ladder": "0"}, "ladder"),
    ],
)
def test_bad_settings(options: dict[str, object], changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        study_from({**options, **changes})
    result = CliRunner().invoke(main, ["study", *words_of({**options, **changes})])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_command_takes_a_study_whose_own_rank_is_a_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file and the default one are not the ladder's."""
    taken: list[StudyConfig] = []

    def climb(config: StudyConfig, *, rank: int, console: object) -> None:
        taken.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr("adaptive_lora.cli.study.climb", climb)
    file = tmp_path / "study.yaml"
    file.write_text("methods: [linear_decay, uniform:rank=4]\nbaseline: uniform-r4", encoding="utf-8")
    for words in (["--rank=2", "--ladder=4 8"], ["--rank=2", "--ladder=4 8", f"--config={file}"]):
        assert CliRunner().invoke(main, ["ladder", *words]).exit_code == 2
    labels = [[spec.label for spec in config.specs] for config in taken]
    assert labels == [["uniform-r2", "uniform-r4", "uniform-r8"]] * 2


def test_rungs_are_the_baseline_at_other_ranks(options: dict[str, object]) -> None:
    given = {**options, "methods": "uniform:budget=uniform-2,placement=attention uniform:rank=4,placement=attention"}
    config = study_from({**given, "ladder": "4 8"})
    assert [spec.label for spec in config.specs] == [
        "uniform-r16-attention@uniform-2", "uniform-r4-attention", "uniform-r8-attention"
    ]  # fmt: skip
    plain, laddered = study_from(given), config
    assert plain.identity() == laddered.identity()


def test_a_study_shares_the_trials_of_its_ladder(in_store: Make, tmp_path: Path) -> None:
    settings = {"methods": "uniform:rank=2 linear_decay:rank=3,low_rank=1", "seeds": "0 1", "lr": "1e-2"}
    outcome, shown = quiet(in_store(**settings, ladder="4"))
    comparison = outcome.study_result.comparison
    assert [method.label for method in comparison.methods] == ["uniform-r2", "linear_decay-r3-1"]
    assert [rung.method for rung in comparison.ladder.rungs] == ["uniform-r2", "uniform-r4"]
    assert "What there is to win" in " ".join(shown.split())
    assert outcome.trials_run == 6
    assert "uniform-r4" not in " ".join(entry.text for entry in comparison.audit)
    page = outcome.study_result.report().read_text()
    assert "What an allocation could win" in page
    again = al.ladder(in_store(seeds="0 1", lr="1e-2"), rank=2, ladder="4")
    assert again.trials_run == 0
    assert again.comparison.ladder == comparison.ladder
    assert again.comparison.ladder.rungs[1].verdict in tuple(VerdictKind)
