"""Studies that go on until they are decided: tests over several looks, and the seeds that a study adds."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from synthetic_study import study
from tracked import quiet, trials_in, words_of

from adaptive_lora.analysis.comparison import Look, SeedPlan, VerdictKind, compare, first_looks
from adaptive_lora.analysis.report.formats import methods_text
from adaptive_lora.analysis.stats import (
    REPEATED,
    Looks,
    repeated_interval,
    sequential_p,
    sequential_sign_flip,
    sign_flip_test,
)
from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.errors import ConfigError, DataError
from adaptive_lora.results import TrialRecord
from adaptive_lora.runner.comparison_input import Selection
from adaptive_lora.runner.looks import _look
from adaptive_lora.runner.run import compare_study

Make = Callable[..., StudyConfig]
LOOKS = Looks(most=10, planned=(5, 7, 10), seeds=(5, 7, 10))


def draws(seed: int, mean: float = 0.0, size: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, size)


class TestSequentialTest:
    """Sign flips at several looks."""

    @pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
    @pytest.mark.parametrize("alpha", [0.05, 0.2])
    def test_of_all_sign_patterns_at_most_alpha_is_ever_rejected(self, alternative: str, alpha: float) -> None:
        size_S = np.abs(draws(1))
        patterns = itertools.product((1, -1), repeat=10)
        found = [
            sequential_sign_flip(size_S * signs, LOOKS, alpha=alpha, alternative=alternative) for signs in patterns
        ]
        share = np.mean([look is not None for look in found])
        assert alpha - 2 / 2**10 <= share <= alpha  # what two flips may leave unspent
        assert len(set(found)) > 2  # at several looks

    def test_one_look_is_the_plain_test(self) -> None:
        once = Looks(most=8, planned=(8,), seeds=(8,))
        for seed in range(20):
            diff_S = draws(seed, 0.6, 8)
            plain = sign_flip_test(diff_S)
            assert (sequential_sign_flip(diff_S, once, alpha=0.05) is not None) is (plain <= 0.05)
            assert sequential_p(diff_S, once) == pytest.approx(plain, rel=2e-3)

    def test_an_early_result_is_kept_whatever_comes_later(self) -> None:
        diff_S = np.concatenate([draws(0, 4.0, 7), draws(2, -4.0, 3)])
        assert sequential_sign_flip(diff_S, LOOKS, alpha=0.05) == 1
        early = dataclasses.replace(LOOKS, planned=(5, 7), seeds=(5, 7))
        assert sequential_p(diff_S, LOOKS) == pytest.approx(sequential_p(diff_S[:7], early), rel=2e-3)
        assert sign_flip_test(diff_S) > 0.2

    def test_p_is_a_level_at_which_it_is_rejected(self) -> None:
        for seed in range(10):
            diff_S = draws(seed, 0.8)
            p = sequential_p(diff_S, LOOKS)
            assert sequential_sign_flip(diff_S, LOOKS, alpha=p) is not None
            assert p >= LOOKS.attainable_p

    @pytest.mark.parametrize("alternative", ["two-sided", "less"])
    def test_of_all_sign_patterns_at_most_a_share_of_p_has_such_a_p(self, alternative: str) -> None:
        """With these sizes the test is not nested: some patterns are rejected at one alpha and not at a larger one."""
        looks, size_S = (
            Looks(most=8, planned=(4, 6, 8), seeds=(4, 6, 8)),
            np.abs(np.random.default_rng(0).standard_t(2, 8)),
        )
        patterns = itertools.product((1, -1), repeat=8)
        p_B = np.array([sequential_p(size_S * signs, looks, alternative=alternative) for signs in patterns])
        assert all(np.mean(p_B <= p) <= p for p in p_B)
        assert np.mean(p_B <= 0.05) >= 0.03

    def test_a_failed_seed_leaves_a_look_with_fewer(self) -> None:
        looks = Looks(most=10, planned=(5, 7, 10), seeds=(5, 6, 9))
        assert 0 < sequential_p(draws(3, 2.0, 9), looks) < 0.1

    @pytest.mark.parametrize(
        "wrong", [{"planned": (7, 5, 10)}, {"seeds": (6, 7, 10)}, {"most": 9}, {"planned": (), "seeds": ()}]
    )
    def test_plans_that_cannot_be(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="required looks at rising numbers"):
            dataclasses.replace(LOOKS, **wrong)
        with pytest.raises(ValueError, match="required 10 differences"):
            sequential_sign_flip(draws(0, size=9), LOOKS, alpha=0.05)


def test_a_repeated_interval_ends_where_the_test_does() -> None:
    for seed in range(5):
        diff_S = draws(seed, 0.5)
        found = repeated_interval(diff_S, LOOKS, confidence=0.9)
        assert found.low < diff_S.mean() < found.high
        inside, outside = (
            [sequential_sign_flip(diff_S - shift, LOOKS, alpha=0.1) for shift in ends]
            for ends in ((found.low + 0.01, found.high - 0.01), (found.low - 0.01, found.high + 0.01))
        )
        assert all(look is not None for look in outside)
        assert all(look is None or look < 2 for look in inside)  # no later look rejects more
    first = dataclasses.replace(LOOKS, planned=(5,), seeds=(5,))
    assert "5 seeds cannot reject" in repeated_interval(draws(0, size=5), first, confidence=0.95).note
    assert repeated_interval(np.ones(10), LOOKS, confidence=0.95).low is None


def records(seeds: int, worse: int, better: float = -0.2) -> list[TrialRecord]:
    """Trials of a baseline, and of two methods, one of which has fewer seeds."""
    effects = {"uniform-r8": 0.0, "linear_decay-r16-4": better, "three_band-r16": 0.0}
    found = study(effects, range(seeds), 0.02)
    return [one for one in found if one.method != "linear_decay-r16-4" or one.seed < worse]


def plan(*added: range, most: int = 12) -> SeedPlan:
    return SeedPlan(most=most, added=tuple(map(tuple, added)))


def test_a_decided_method_lacks_no_seeds_and_its_verdict_stays() -> None:
    first = plan(range(8))
    early = compare(records(8, 8), baseline="uniform-r8", margin=0.001, plan=first)
    look = _look(early, first)
    kinds = {row.method: row.verdict for row in look.methods}
    assert kinds == {"linear_decay-r16-4": VerdictKind.BETTER, "three_band-r16": VerdictKind.INCONCLUSIVE}
    second = dataclasses.replace(plan(range(8), range(8, 12)), earlier=(look,))
    late = compare(records(12, 8), baseline="uniform-r8", margin=0.001, plan=second)
    decided, still = late.method("linear_decay-r16-4"), late.method("three_band-r16")
    assert decided.verdict.kind is VerdictKind.BETTER
    assert decided.missing_seeds == still.missing_seeds == ()
    assert late.deciding_p(decided.difference) <= early.deciding_p(early.method(decided.label).difference)
    assert [row.method for row in _look(late, second).methods] == ["three_band-r16"]
    assert "up to the look that decided it" in " ".join(entry.text for entry in late.audit)
    assert any("looked at after 8 and 12" in note for note in late.notes)
    told = dataclasses.replace(second, margin=late.margin)
    assert SeedPlan.from_dict(json.loads(json.dumps(told.to_dict()))) == told
    assert late.to_dict()["looks"] == json.loads(json.dumps(told.to_dict()))["looks"]
    assert "looks" not in compare(records(8, 8), baseline="uniform-r8").to_dict()


def test_seeds_that_were_never_looked_at_do_not_count() -> None:
    found = compare(records(12, 12), baseline="uniform-r8", margin=0.05, plan=plan(range(8)))
    assert found.methods[1].difference.replicates == 8
    late = dataclasses.replace(plan(range(8), range(8, 12)), earlier=(_look(found, plan(range(8))),))
    assert late.earlier[0].decided("linear_decay-r16-4")
    again = compare(records(12, 12), baseline="uniform-r8", margin=0.05, plan=late)
    assert again.method("linear_decay-r16-4").difference.replicates == 8


def test_a_rate_is_that_of_the_first_look() -> None:
    """Another rate would be the best of all seeds, and does not change the choice."""

    def rate(lr: float, losses: list[float]) -> list[TrialRecord]:
        one = [record for record in records(12, 12) if record.method == "uniform-r8"]
        return [dataclasses.replace(r, lr=lr, validation_loss=loss) for r, loss in zip(one, losses, strict=True)]

    both = [*rate(0.1, [1.0] * 8 + [3.0] * 4), *rate(0.2, [2.0] * 8 + [0.0] * 4)]
    others = [record for record in records(12, 12) if record.method != "uniform-r8"]
    found = compare([*both, *others], baseline="uniform-r8", margin=0.05, plan=plan(range(8), range(8, 12)))
    assert found.method("uniform-r8").lr == 0.1
    assert [rate.validation.mean for rate in found.method("uniform-r8").rates] == [1.0, 2.0]
    assert compare([*both, *others], baseline="uniform-r8", margin=0.05).method("uniform-r8").lr == 0.2


def test_the_methods_paragraph_tells_the_looks() -> None:
    first = plan(range(8))
    told = compare(records(8, 8), baseline="uniform-r8", margin=0.05, plan=first)
    told = dataclasses.replace(told, looks=(_look(told, first), Look(seeds=(8, 9), methods=())))
    assert "sign-flip test over seeds" in methods_text(told, records(8, 8))
    assert "repeated after 8 and 10 seeds until each comparison was decided" in methods_text(told, records(8, 8))
    assert "repeated after" not in methods_text(compare(records(8, 8), baseline="uniform-r8"), records(8, 8))


@pytest.mark.parametrize(
    ("counts", "comparisons", "expected"),
    [((6, 8, 10, 12, 14, 16), 1, (8, 8)), ((6, 8, 10, 12, 14, 16), 5, (10, 8)), ((2, 4), 1, (None, None))],
)
def test_when_anything_can_be_shown(
    counts: tuple[int, ...], comparisons: int, expected: tuple[int | None, int | None]
) -> None:
    assert first_looks(counts, comparisons) == expected
    looks = Looks(most=counts[-1], planned=counts, seeds=counts)
    sure = sequential_sign_flip(np.arange(1.0, counts[-1] + 1), looks, alpha=0.05 / comparisons)
    assert (None if sure is None else counts[sure]) == expected[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"until": "bored"}, "until"),
        ({"max_seeds": 2}, "required more than the 2 seeds of the first look, got 2"),
        ({"max_seeds": 21}, "max_seeds"),
        ({"correction": "max_t"}, "corrected by holm; required that correction, got max_t"),
        ({"methods": "uniform:rank=2"}, "at least two methods"),
        ({"until": "seeds", "max_seeds": 9}, "max_seeds: only a study until it is decided"),
        ({"until": "seeds", "look_seeds": 4}, "look_seeds: only a study until it is decided"),
        ({"seeds": "4294967290 4294967291"}, "leave room for 14 more"),
    ],
)
def test_bad_settings(options: dict[str, object], changes: dict[str, object], says: str) -> None:
    values = {**options, "until": "decided", **changes}
    with pytest.raises(ConfigError, match=says):
        study_from(values)
    result = CliRunner().invoke(main, ["study", *words_of(values)])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_seeds": 4}, "4 seeds cannot show a difference in any of 1 comparison at 5 %"),
        ({"max_seeds": 4}, "required max_seeds of at least 6."),
        ({"methods": "uniform:rank=1 uniform:rank=2 uniform:rank=3", "max_seeds": 6}, "at least 7, or fewer methods"),
    ],
)
def test_seeds_that_cannot_decide_are_refused_before_training(
    options: dict[str, object], changes: dict[str, object], says: str
) -> None:
    values = {**options, "until": "decided", **changes}
    result = CliRunner().invoke(main, ["study", *words_of(values)])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
    with pytest.raises(ConfigError, match="cannot show a difference"):
        quiet(study_from(values))


def test_seeds_that_are_added_come_after_those_given(options: dict[str, object]) -> None:
    config = study_from({**options, "until": "decided", "seeds": "100 7", "max_seeds": 7, "look_seeds": 3})
    assert config.seeds_by_look() == ((100, 7), (101, 102, 103), (104, 105))


def test_a_study_adds_seeds_to_open_methods_and_continues(in_store: Make, tmp_path: Path) -> None:
    """The clearly worse arm, which trains one scale only, is decided before the twin of the baseline."""
    settings = {
        "methods": "uniform:rank=2 uniform:rank=2,alpha=9 head_only", "seeds": "0 1 2 3 4 5 6 7",
        "lr": "1e-3 1e-2", "until": "decided", "max_seeds": 10, "margin": 1e-9,
    }  # fmt: skip
    config = in_store(**settings)
    outcome, shown = quiet(config)
    looks = outcome.study_result.comparison.looks
    assert "look   8 seeds of at most 10" in shown
    assert sum(one.seeds for one in looks[-1].methods) <= 20
    again, _ = quiet(config)
    assert again.trials_run == 0
    assert again.study_result.comparison.to_dict() == outcome.study_result.comparison.to_dict()
    by_method = {m.label: len(m.seeds) for m in again.study_result.comparison.methods}
    later = [t.data.tags["lr"] for t in trials_in(tmp_path) if int(t.data.tags["seed"]) > 7]
    assert len(later) == sum(by_method.values()) - 24  # at one rate each
    for other, says in (
        ({**settings, "max_seeds": 12}, "has the plan looks at"),
        ({k: v for k, v in settings.items() if k not in ("until", "max_seeds")}, "goes on until it is decided"),
    ):
        with pytest.raises(ConfigError, match=says):
            quiet(in_store(**other))


def test_folds_a_ladder_and_another_margin(in_store: Make, tmp_path: Path) -> None:
    """A rung of the ladder gets the seeds that are given, and no more."""
    config = in_store(
        methods="uniform:rank=2 random:of=linear_decay,rank=4,low_rank=1", seeds="0 1 2 3 4 5", until="decided",
        max_seeds=7, look_seeds=1, folds=2, max_steps=1, margin_percent=0.001, ladder="3", study="folded",
    )  # fmt: skip
    outcome, shown = quiet(config)
    comparison = outcome.study_result.comparison
    assert "look   7 seeds of at most 7" in shown
    assert [look.methods[0].seeds for look in comparison.looks] == [6, 7]
    tags = [run.data.tags for run in trials_in(tmp_path)]
    assert Counter((one["method"], int(one["seed"]) > 5) for one in tags) == {
        ("uniform-r2", False): 12, ("random-linear_decay-r4-1", False): 12, ("uniform-r3", False): 12,
        ("uniform-r2", True): 2, ("random-linear_decay-r4-1", True): 2,
    }  # fmt: skip
    rung = comparison.ladder.rungs[-1]
    assert rung.method == "uniform-r3"
    assert rung.interval.low is not None
    assert REPEATED not in rung.interval.method
    again = partial(compare_study, config.tracking, Selection(study_ids=(outcome.study_result.study_id,)))
    assert again({}, Console(quiet=True))[0].comparison.margin == comparison.margin
    other = again({"margin_percent": 2.0}, Console(quiet=True))[0].comparison
    assert other.margin.value == pytest.approx(2000 * comparison.margin.value, rel=0.2)
    turned = again({"baseline": "random-linear_decay-r4-1"}, Console(quiet=True))[0].comparison
    assert turned.ladder == comparison.ladder
    with pytest.raises(DataError, match="its p-values hold for that study alone"):
        compare_study(config.tracking, Selection(query="tags.seed = '0'"), {}, Console(quiet=True))


def test_a_study_that_was_compared_gets_no_plan(in_store: Make) -> None:
    settings = {"methods": "uniform:rank=2 uniform:rank=3", "max_steps": 1}
    quiet(in_store(**settings))
    with pytest.raises(ConfigError, match="was compared before it had a plan of looks"):
        quiet(in_store(**settings, until="decided", max_seeds=8))
