"""Verdicts on runs made elsewhere: tables, data frames and runs of MLflow."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from scipy import stats as distributions

import adaptive_lora as al
from adaptive_lora.analysis.comparison import VerdictKind
from adaptive_lora.cli import main
from adaptive_lora.errors import AdaptiveLoraError, ConfigError, DataError

Row = dict[str, Any]


def table(
    effects: Mapping[str, float], seeds: Sequence[int] = range(7), noise: float = 0.003, **more: Any
) -> list[Row]:
    """Return rows with known effects on an accuracy, over seeds that share most of their noise."""
    rng = np.random.default_rng(0)
    shared = {seed: 0.7 + rng.normal(0, 0.02) for seed in seeds}
    return [
        {"method": method, "seed": seed, "score": shared[seed] + effect + rng.normal(0, noise), **more}
        for method, effect in effects.items()
        for seed in seeds
    ]


def verdict_of(rows: Any, **options: Any) -> VerdictKind:
    options = {"baseline": "uniform", "higher_is_better": True, "margin": 0.01, **options}
    return al.compare(rows, **options).comparison.methods[1].verdict.kind


def write(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


@pytest.mark.parametrize(
    ("effect", "higher", "kind"),
    [
        (0.03, True, VerdictKind.BETTER),
        (0.03, False, VerdictKind.WORSE),
        (-0.03, True, VerdictKind.WORSE),
        (-0.03, False, VerdictKind.BETTER),
        (0.0, True, VerdictKind.EQUIVALENT),
    ],
)
def test_known_effects_get_their_verdict(effect: float, higher: bool, kind: VerdictKind) -> None:
    assert verdict_of(table({"uniform": 0.0, "waterfill": effect}), higher_is_better=higher) is kind


def test_numbers_are_those_of_the_paired_tests_of_scipy() -> None:
    rows = table({"uniform": 0.0, "waterfill": 0.004})
    result = al.compare(rows, baseline="uniform", higher_is_better=True)
    base, method = (np.array([r["score"] for r in rows if r["method"] == name]) for name in ("uniform", "waterfill"))
    row = result.table[1]
    difference = result.comparison.methods[1].difference
    assert row["difference"] == pytest.approx((method - base).mean())
    assert row["score"] == pytest.approx(method.mean())
    assert difference.tests.paired_t == pytest.approx(distributions.ttest_rel(method, base).pvalue)
    assert difference.tests.wilcoxon == pytest.approx(distributions.wilcoxon(method - base).pvalue)
    flips = distributions.permutation_test(
        (method, base), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=2**7
    )
    assert difference.tests.sign_flip == pytest.approx(flips.pvalue)


def test_example_scores_of_several_seeds_give_an_interval_over_both() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(120)
    rows = [
        {"method": method, "seed": seed, "example": f"q{place}", "score": float(rng.random() < 0.4 + 0.4 * easy + gain)}
        for method, gain in (("uniform", 0.0), ("waterfill", 0.1))
        for seed in range(6)
        for place, easy in enumerate(hard)
    ]
    comparison = al.compare(rows, baseline="uniform", higher_is_better=True).comparison
    difference = comparison.methods[1].difference
    assert (comparison.over, difference.replicates, difference.components.examples) == ("seed", 6, 120)
    assert difference.hierarchical.low < difference.interval.low < difference.mean
    assert len(comparison.methods[1].most_changed) > 0


def test_seeds_and_examples_that_cannot_be_paired_are_counted_by_name() -> None:
    rows = [row for row in table({"uniform": 0.0, "waterfill": 0.03}) if (row["method"], row["seed"]) != ("uniform", 2)]
    rows = [row for row in rows if (row["method"], row["seed"]) not in (("waterfill", 5), ("waterfill", 6))]
    result = al.compare(rows, baseline="uniform", higher_is_better=True)
    (lines,) = result.about.data.values()
    assert "not paired: 1 seed that waterfill has and uniform lacks (2)" in lines
    assert "not paired: 2 seeds that uniform has and waterfill lacks (5 and 6)" in lines
    assert result.comparison.methods[1].difference.seeds == (0, 1, 3, 4)
    one = [
        {"method": m, "example": e, "score": float(e in m)} for m in ("ab", "bc") for e in "abcdefgh"[: 7 + (m == "ab")]
    ]
    (lines,) = al.compare(one, baseline="ab", higher_is_better=True).about.data.values()
    assert "seeds: no such column, so each method has one run" in lines
    assert "examples: 7 a run; left out, since not every run of the seed has them: 1 example (h)" in lines


def test_budgets_that_are_not_given_are_not_shown_as_zeros(tmp_path: Path) -> None:
    rows = table({"uniform": 0.0, "waterfill": 0.03})
    result = al.compare(rows, baseline="uniform", higher_is_better=True)
    page = result.report(tmp_path / "report").read_text(encoding="utf-8")
    assert "Parameters: not given for uniform and waterfill" in page
    assert "Parameters" not in result.comparison.headline
    assert [row["parameters"] for row in result.table] == [None, None]
    for word in ("test loss", "Test loss", "nats", "frozen base model"):
        assert word not in page, word
    given = al.compare([{**row, "budget": 1000} for row in rows], baseline="uniform", higher_is_better=True)
    assert "at equal parameters" in given.verdict


def test_a_rate_is_chosen_on_validation_and_never_on_the_score_that_is_compared() -> None:
    rows = [
        {**row, "rate": rate, "score": row["score"] + worse, "validation": row["score"] + better}
        for row in table({"uniform": 0.0, "waterfill": 0.0})
        for rate, worse, better in ((1e-4, 0.0, 0.0), (1e-3, -0.02, 0.1))
    ]
    comparison = al.compare(rows, baseline="uniform", higher_is_better=True).comparison
    assert [method.lr for method in comparison.methods] == [1e-3, 1e-3]  # best on validation, worse on the score
    few = [row for row in rows if (row["method"], row["rate"]) != ("waterfill", 1e-3) or row["seed"] < 3]
    (lines,) = al.compare(few, baseline="uniform", higher_is_better=True).about.data.values()
    assert "rate 0.001 of waterfill: 3 of 7 seeds, so it is not chosen" in lines
    without = [{name: value for name, value in row.items() if name != "validation"} for row in rows]
    with pytest.raises(DataError, match="uniform has 2 learning rates and no validation score"):
        al.compare(without, baseline="uniform", higher_is_better=True)


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_answer(tmp_path: Path, ending: str) -> None:
    rows = [
        {"model": row["method"], "run": row["seed"], "accuracy": row["score"]}
        for row in table({"uniform": 0.0, "waterfill": 0.03})
    ]
    frame, path = pd.DataFrame(rows), tmp_path / f"runs.{ending}"
    if ending in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="," if ending == "csv" else "\t", encoding="utf-8-sig")
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=ending == "jsonl", double_precision=15)
    columns = {"method": "model", "seed": "run", "score": "accuracy"}
    read = al.compare(path, columns=columns, baseline="uniform")
    made = al.compare(frame, columns=columns, baseline="uniform")
    assert read.comparison.outcome.name == "accuracy"
    for mine, theirs in zip(read.table, made.table, strict=True):
        assert mine["score"] == pytest.approx(theirs["score"])
        assert mine["verdict"] == theirs["verdict"]


def test_command_prints_what_was_read_and_writes_the_report(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", table({"uniform": 0.0, "waterfill": 0.03}, gpu="a100", params=98304))
    words = (
        "--runs",
        path,
        "--columns",
        "budget=params",
        "--baseline",
        "uniform",
        "--higher-is-better",
        "--margin",
        "0.01",
    )
    result = invoke(*words, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for part in (
        "columns read: method, seed, score, budget (params)",
        "columns not read: gpu",
        "waterfill is better than uniform: score +0.0",
        "at equal parameters",
    ):
        assert part in text
    (page,) = (tmp_path / "out").glob("compare-*/report.html")
    assert "columns not read: gpu" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "mlflow.db").exists()
    document = json.loads(invoke(*words, "--output", tmp_path / "out", "--json").stdout)
    assert document["schema"] == "adaptive-lora/compare/1"
    assert document["outcome"] == {"name": "score", "unit": "", "higher_is_better": True}


GOOD = table({"uniform": 0.0, "waterfill": 0.03}, seeds=range(3))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*GOOD, {**GOOD[0], "score": 0.5}], "two rows of one run (method uniform, seed 0): row 0 and row 6"),
        ([row for row in GOOD if row["seed"] == 0], "one paired seed and no scores of single examples"),
        ([{**row, "seed": row["seed"] + 10 * (row["method"] == "uniform")} for row in GOOD], "no method shares a seed"),
        ([row for row in GOOD if row["method"] == "uniform"], "required runs of two methods or more, got one: uniform"),
        ([{**row, "score": "high"} for row in GOOD], "row 0, column score: required a number, got 'high'"),
        ([{**row, "score": "0,71"} for row in GOOD], "write a decimal point"),
        ([{**row, "score": "71 %"} for row in GOOD], "write a share without the sign"),
        ([{**row, "score": math.nan} for row in GOOD], "column score: required a number, got NaN"),
        ([{**row, "score": math.inf} for row in GOOD], "column score: required a finite number, got inf"),
        ([{**row, "score": None} for row in GOOD], "got an empty cell. A run without a score is left out"),
        ([{**row, "score": True} for row in GOOD], "required a finite number, got True"),
        ([], "has no rows"),
        ([{"method": "a", "score": 1.0}], "has no column seed (its columns: method, score); required seed (seed of"),
        ([{"model": "a", "seed": 0, "score": 1.0}], "--columns method=NAME"),
        ([{**row, "seed": 1.5} for row in GOOD], "column seed: required a whole number of at most 64 bits, got 1.5"),
        ([{**row, "seed": 10**30} for row in GOOD], "required a whole number of at most 64 bits, got 1000"),
        ([{**row, "seed": "first"} for row in GOOD], "required a whole number of at most 64 bits, got 'first'"),
        ([{**GOOD[0], "method": 8}, {**GOOD[1], "method": "8"}], "method 8 is text here and a number in"),
        ([{**row, "method": ""} for row in GOOD], "required the name of a method, got an empty cell"),
        ([{**row, "budget": -1} for row in GOOD], "required a whole number of parameters above 0, got -1"),
        ([{**row, "rate": 0} for row in GOOD], "required a learning rate above 0, got 0"),
        ([{**GOOD[0], "rate": 1e-3}, *GOOD[1:]], "method uniform: only some of its runs have a learning rate"),
        ([{**row, "example": row["method"]} for row in GOOD], "share no example: uniform has uniform"),
        ([1, 2], "item 0: required a dictionary with columns, got int"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_by_name(rows: list[Row], says: str) -> None:
    with pytest.raises(AdaptiveLoraError) as error:
        al.compare(rows, baseline="uniform", higher_is_better=True)
    assert says in str(error.value)


def test_names_that_are_numbers_keep_all_digits() -> None:
    rows = table({"1234567": 0.0, "1234568": 0.03})
    found = al.compare(
        [{**row, "method": float(row["method"]), "seed": f"{row['seed']}.0", "example": 1e6 + 1} for row in rows],
        baseline="1234567",
        higher_is_better=True,
    )
    assert [row["method"] for row in found.table] == ["1234567", "1234568"]
    assert {record.seed for record in found.records} == set(range(7))
    assert found.records[0].test is not None
    assert found.records[0].test.example_ids == ("1000001",)


def test_bad_arguments_are_refused() -> None:
    for says, options in (
        ("required whether more of it is better", {"baseline": "uniform"}),
        ("required the baseline (--baseline), one of: uniform, waterfill", {"higher_is_better": True}),
        ("unknown baseline 'uniforn'; did you mean 'uniform'?", {"baseline": "uniforn", "higher_is_better": True}),
        ("unknown role 'scores'; did you mean 'score'?", {"columns": {"scores": "score"}}),
        ("score: unknown column 'acc'", {"columns": {"score": "acc"}}),
        ("unknown correction 'bonferroni'", {"correction": "bonferroni"}),
        ("margin: required above 0, got -1", {"baseline": "uniform", "higher_is_better": True, "margin": -1.0}),
        ("margin: required a number, got '0.1'", {"margin": "0.1"}),
        ("higher_is_better must be True, False or None; got 'no'", {"higher_is_better": "no"}),
        ("validation and score are both 'score'", {"columns": {"validation": "score"}}),
        ("metrics: not for a table or MLflow runs", {"metrics": ["acc"]}),
    ):
        with pytest.raises(AdaptiveLoraError) as error:
            al.compare(GOOD, **options)
        assert says in str(error.value)
    with pytest.raises(ConfigError, match="got int"):
        al.compare(3)


def test_methods_may_be_numbers() -> None:
    rows = [{**row, "method": 8 if row["method"] == "uniform" else 16} for row in table({"uniform": 0.0, "wide": 0.03})]
    assert verdict_of(rows, baseline=8) is VerdictKind.BETTER


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("method;seed;score\na;0;1\n", (), "separated by semicolons; required commas"),
        ("\ufeffmethod;seed;score\na;0;0,7\n", (), "separated by semicolons; required commas"),
        ("method,seed,score\na,0\n", (), "line 2: required 3 fields, got 2"),
        ("", (), "is empty"),
        ("method,seed,score\n", (), "holds no examples"),
        ("method,seed,score\na,0,1\nb,0,1\n", ("--columns", "score"), "ROLE=NAME, each role once, got 'score'"),
        ("method,seed,score\na,0,1\n", ("--lm-eval", "x"), "required one of --runs, --lm-eval, --mlflow-query, got"),
        ("method,seed,score\na,0,1\n", ("--study-id", "x"), "--study-id: not used with --runs"),
        ("method,seed,score\na,0,1\n", ("--registered-model", "x"), "--registered-model: not used with --runs"),
    ],
)  # fmt: skip
def test_bad_files_and_options_end_with_one_message(
    tmp_path: Path, text: str, words: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    result = invoke("--runs", path, "--baseline", "a", "--higher-is-better", *words, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_table_and_no_source_are_named(tmp_path: Path) -> None:
    for words, says in (
        (("--runs", tmp_path / "none.csv"), "does not exist"),
        (("--runs", tmp_path), "is a folder"),
        (("--higher-is-better",), "required one of --runs, --lm-eval, --mlflow-query, got none"),
    ):
        result = invoke(*words, "--output", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert says in " ".join(result.stderr.split())


def test_runs_of_mlflow_are_compared_by_tags_and_parameters(own_store: str, tmp_path: Path) -> None:
    client = MlflowClient(own_store)
    experiment = client.create_experiment("sweep")
    for row in table({"4": 0.0, "16": 0.03}, seeds=range(6)):
        run = client.create_run(experiment, tags={"part": "lora"})
        client.log_param(run.info.run_id, "lora_r", row["method"])
        client.log_param(run.info.run_id, "seed", row["seed"])
        client.log_metric(run.info.run_id, "eval_accuracy", row["score"])
        client.set_terminated(run.info.run_id)
    failed = client.create_run(experiment, tags={"part": "lora"})
    client.set_terminated(failed.info.run_id, "FAILED")
    bare = client.create_run(experiment, tags={"part": "lora"})
    client.set_terminated(bare.info.run_id)
    before = len(client.search_runs([experiment], max_results=1000))
    words = (
        "--experiment", "sweep", "--tracking-uri", own_store, "--baseline", "4", "--output", tmp_path / "out",
        "--columns", "method=params.lora_r,seed=params.seed,score=metrics.eval_accuracy",
    )  # fmt: skip
    result = invoke("--mlflow-query", "tags.part = 'lora'", *words)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "MLflow: 14 runs, of which 12 are compared" in text
    assert "1 run of status FAILED; 1 run without" in text
    assert "16 is better than 4: metrics.eval_accuracy +0.0" in text
    assert len(client.search_runs([experiment], max_results=1000)) == before
    runs = client.search_runs([experiment])
    columns = {"method": "params.lora_r", "seed": "params.seed", "score": "metrics.eval_accuracy"}
    assert al.compare(runs, columns=columns, baseline="4").comparison.winner == "16"
    for words_, says in (
        (("--mlflow-query", "tags.part = 'none'", *words), "matches \"tags.part = 'none'\""),
        (("--mlflow-query", "part is lora", *words), "Required MLflow's syntax"),
        (("--mlflow-query", "", *words, "--experiment", "swep"), "unknown experiment 'swep'; did you mean 'sweep'?"),
        (
            ("--mlflow-query", "", *words, "--columns", "method=params.r"),
            "required --columns with score=NAME and seed=NAME",
        ),
        (
            ("--mlflow-query", "", *words, "--columns", "method=params.r,seed=params.seed,score=metrics.loss"),
            "no run of MLflow can be compared",
        ),
    ):
        result = invoke(*words_)
        assert result.exit_code == 2, result.output
        assert says in " ".join(result.stderr.split())
