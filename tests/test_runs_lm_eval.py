"""Verdicts on output of lm-evaluation-harness: pairing by document, several tasks, and folders that do not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats as distributions

import adaptive_lora as al
from adaptive_lora.analysis.comparison import VerdictKind
from adaptive_lora.cli import main
from adaptive_lora.errors import AdaptiveLoraError

REAL = Path(__file__).parent / "fixtures" / "lm_eval"
"""Output of lm-evaluation-harness 0.4.13 with its model `dummy`, without facts on the machine."""
DATE = "2026-05-04T10-20-30.123456"

Scores = Mapping[str, Mapping[str, np.ndarray]]
"""Task -> metric -> scores by document."""


def write_run(
    folder: Path, scores: Scores, *, date: str = DATE, filters: tuple[str, ...] = ("none",), **changes: Any
) -> Path:
    """Write a run as the harness writes it."""
    home = folder / "org__model"
    home.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "results": {
            task: {"alias": task} | {f"{m},{f}": float(v.mean()) for m, v in own.items() for f in filters}
            for task, own in scores.items()
        },
        "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, 5),
        "higher_is_better": {task: dict.fromkeys(own, True) for task, own in scores.items()},
        "n-samples": {
            task: {"original": 999, "effective": len(next(iter(own.values())))} for task, own in scores.items()
        },
        "chat_template_sha": None,
    }
    results.update({name.replace("_shot", "-shot"): value for name, value in changes.items()})
    (home / f"results_{date}.json").write_text(json.dumps(results), encoding="utf-8")
    for task, own in scores.items():
        lines = [
            {
                "doc_id": number,
                "arguments": {"gen_args_0": {"arg_0": f"{task} question {number}", "arg_1": " answer"}},
                "filter": name,
                "metrics": list(own),
                "doc_hash": hashlib.sha256(f"{task} {number}".encode()).hexdigest(),
                **{metric: float(values[number]) for metric, values in own.items()},
            }
            for name in filters
            for number in range(len(next(iter(own.values()))))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (home / f"samples_{task}_{date}.jsonl").write_text(text, encoding="utf-8")
    return folder


def answers(share: float, examples: int = 400, seed: int = 0, changed: float = 0.1) -> np.ndarray:
    """Return scores of 0 and 1; runs with other seeds answer some of the same documents differently."""
    rng = np.random.default_rng(7)
    right_E = rng.random(examples) < share
    flipped_E = np.random.default_rng(100 + seed).random(examples) < changed
    return (right_E ^ flipped_E).astype(float)


def two_runs(folder: Path, gain: float = 0.0, **changes: Any) -> list[str]:
    tasks = ("arc_easy", "gsm8k")
    base = {task: {"acc": answers(0.6, seed=place)} for place, task in enumerate(tasks)}
    better = {task: {"acc": np.maximum(own["acc"], answers(gain, seed=9, changed=0.0))} for task, own in base.items()}
    return [str(write_run(folder / "uniform", base)), str(write_run(folder / "waterfill", better, **changes))]


def lines_of(result: Any) -> str:
    return "\n".join(line for lines in result.about.data.values() for line in lines)


def test_output_of_the_harness_itself_is_read() -> None:
    result = al.compare([REAL / "uniform", REAL / "waterfill"])
    summaries = [
        json.loads(next((REAL / name / "dummy").glob("results_*")).read_text()) for name in ("uniform", "waterfill")
    ]
    ours = result.tasks["sums_choice acc"].table
    stated = [summary["results"]["sums_choice"]["acc,none"] for summary in summaries]
    assert [row["score"] for row in ours] == pytest.approx(stated)
    text = lines_of(result)
    assert (
        "task sums_choice acc: version 1.0, 0-shot, acc, higher is better; 40 examples; not compared: acc_norm" in text
    )
    assert "task sums_generate exact_match (strict-match): version 2.0" in text
    assert "exact_match (flexible-extract)" in text
    assert (
        "task sums_text: left out, since none of its scores is a mean over its examples: word_perplexity (none)" in text
    )
    assert "baseline: uniform, of the first folder" in text
    assert result.comparison.over == "example"
    assert result.table[0]["score"] == pytest.approx((stated[0] + 0.0) / 2)


def test_one_task_is_mcnemars_exact_test(tmp_path: Path) -> None:
    base_E, better_E = answers(0.6), answers(0.66, seed=1)
    folders = [
        write_run(tmp_path / "uniform", {"gsm8k": {"exact_match": base_E}}),
        write_run(tmp_path / "waterfill", {"gsm8k": {"exact_match": better_E}}),
    ]
    result = al.compare(folders, margin=0.05)
    difference = result.comparison.methods[1].difference
    gained, lost = int((better_E > base_E).sum()), int((better_E < base_E).sum())
    assert difference.tests.sign_flip == pytest.approx(distributions.binomtest(gained, gained + lost).pvalue)
    assert difference.mean == pytest.approx((better_E - base_E).mean())
    assert result.comparison.outcome.name == "gsm8k exact_match"
    assert not result.tasks
    assert any("nothing about other seeds" in note for note in result.comparison.notes)
    example = result.comparison.methods[1].most_changed[0].example_id
    assert result.about.examples[example].startswith("gsm8k question")


def test_tasks_are_averaged_and_each_is_corrected_for_all(tmp_path: Path) -> None:
    """A gain on one of three tasks is found there, at a p corrected for three tasks."""
    base = {f"task{n}": {"acc": answers(0.6, examples=300 * (n + 1), seed=n)} for n in range(3)}
    better = {task: {"acc": own["acc"].copy()} for task, own in base.items()}
    wrong = np.flatnonzero(base["task0"]["acc"] == 0)[:24]
    better["task0"]["acc"][wrong] = 1.0
    result = al.compare([write_run(tmp_path / "uniform", base), write_run(tmp_path / "waterfill", better)])
    comparison = result.comparison
    assert comparison.outcome.name == "acc averaged over 3 tasks"
    assert comparison.methods[1].difference.mean == pytest.approx(24 / 300 / 3)  # every task weighs the same
    first, *others = comparison.tasks
    alone = distributions.binomtest(24, 24).pvalue
    assert first.difference.tests.sign_flip == pytest.approx(alone)
    assert first.p_corrected == pytest.approx(3 * alone)
    assert first.verdict.kind is VerdictKind.BETTER
    assert {row.verdict.kind for row in others} == {VerdictKind.INCONCLUSIVE}
    assert [row.task for row in comparison.tasks] == ["task0 acc", "task1 acc", "task2 acc"]
    own = result.tasks["task0 acc"]
    assert own.comparison.methods[1].verdict.kind is VerdictKind.BETTER
    page = result.report(tmp_path / "report").read_text(encoding="utf-8")
    assert "Each task" in page
    for word in ("test loss", "Test loss", "nats"):
        assert word not in page


def test_several_seeds_are_paired_by_seed(tmp_path: Path) -> None:
    places = []
    for method, share in (("uniform", 0.6), ("waterfill", 0.7)):
        for seed in range(6):
            scores = {"gsm8k": {"acc": answers(share, seed=seed)}, "arc": {"acc": answers(share, 200, seed=seed + 50)}}
            places.append(write_run(tmp_path / f"{method}-seed{seed}", scores))
    result = al.compare(places)
    difference = result.comparison.methods[1].difference
    assert (result.comparison.over, difference.replicates) == ("seed", 6)
    assert result.comparison.methods[1].verdict.kind is VerdictKind.BETTER
    assert "run waterfill, seed 5:" in lines_of(result)
    assert difference.components.examples == 600
    expected = np.mean([answers(0.7).mean() - answers(0.6).mean() for _ in range(1)])
    assert difference.mean == pytest.approx(expected, abs=0.05)


def test_names_of_folders_and_of_options_give_method_and_seed(tmp_path: Path) -> None:
    base, better = two_runs(tmp_path)
    both = tmp_path / "both"
    shutil.copytree(Path(base) / "org__model", both / "small-seed2")
    shutil.copytree(Path(better) / "org__model", both / "large_seed=2")
    assert "run large, seed 2:" in lines_of(al.compare(both))
    named = al.compare([f"A:3={base}", f"B:3={better}"], baseline="B")
    assert "run A, seed 3:" in lines_of(named)
    assert named.comparison.baseline == "B"


def test_examples_and_tasks_that_not_all_runs_have_are_counted(tmp_path: Path) -> None:
    base = {"gsm8k": {"acc": answers(0.6)}, "arc": {"acc": answers(0.6)}}
    folders = [
        write_run(tmp_path / "uniform", base),
        write_run(tmp_path / "waterfill", {"gsm8k": {"acc": answers(0.7, seed=1)[:250]}}),
    ]
    text = lines_of(al.compare(folders))
    assert "task arc: left out, since it is missing in waterfill, seed 0" in text
    assert (
        "250 examples, which all runs share; 150 left out (uniform, seed 0 has 400 and waterfill, seed 0 has 250)"
        in text
    )
    write_run(tmp_path / "waterfill", {"gsm8k": {"acc": answers(0.7, seed=1)}}, date="2026-06-01T00-00-00")
    result = al.compare(folders, tasks=["gsm8k"])
    assert "earlier results not used: 1 file of gsm8k" in lines_of(result)
    assert result.comparison.methods[1].difference.replicates == 400


def test_filters_and_metrics_are_chosen_by_name(tmp_path: Path) -> None:
    scores = {"gsm8k": {"acc": answers(0.6), "acc_norm": answers(0.65, seed=3)}}
    both = ("strict-match", "flexible-extract")
    folders = [write_run(tmp_path / name, scores, filters=both) for name in ("uniform", "waterfill")]
    result = al.compare(folders, metrics=["acc_norm", "acc"], filters=["flexible-extract"])
    assert list(result.tasks) == ["gsm8k acc_norm (flexible-extract)", "gsm8k acc (flexible-extract)"]
    assert result.comparison.outcome.name == "gsm8k acc_norm (flexible-extract)"  # the first is the answer's


def _without_samples(folder: Path) -> None:
    next(folder.rglob("samples_gsm8k_*")).unlink()
    next(folder.rglob("samples_arc_easy_*")).unlink()


def _broken(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).write_text(text, encoding="utf-8") and None


def _changed(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), key: value}), encoding="utf-8")

    return change


def _cut(folder: Path) -> None:
    path = next(folder.rglob("samples_gsm8k_*"))
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:-3]), encoding="utf-8")


def _twice(folder: Path) -> None:
    path = next(folder.rglob("samples_gsm8k_*"))
    path.write_text(path.read_text("utf-8") * 2, encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_samples, "and no samples_TASK_DATE.jsonl beside them; run lm_eval with --log_samples"),
        (_broken("results_*", "{"), "cannot be read as JSON"),
        (_broken("results_*", "[1]"), "a JSON object with the key results"),
        (_broken("samples_gsm8k_*", "{\n"), "line 1: not JSON"),
        (_broken("samples_gsm8k_*", '{"doc_id": 1}\n'), "required a sample with doc_id and doc_hash"),
        (_changed("results_*", "versions", 3), "versions: required an object with a value per task"),
        (_changed("results_*", "n-samples", {"gsm8k": 5}), "n-samples: required an object with an object per task"),
        (
            _broken("samples_gsm8k_*", '{"doc_id": 1, "doc_hash": "a", "metrics": 7}\n'),
            "required a list of names, got 7",
        ),
        (_broken("samples_gsm8k_*", "\n"), "has no scores of examples"),
        (_cut, "has 397 examples a filter and metric, and its results 400: the file is not whole"),
        (_twice, "is given twice for filter none"),
        (lambda folder: shutil.rmtree(folder / "org__model"), "has no results_DATE.json"),
        (shutil.rmtree, "does not exist; required FOLDER, NAME=FOLDER or NAME:SEED=FOLDER"),
    ],
)
def test_broken_folders_are_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    base, better = two_runs(tmp_path)
    spoil(Path(better))
    result = invoke("--lm-eval", base, "--lm-eval", better, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"versions": {"arc_easy": 2.0, "gsm8k": 1.0}}, "version of arc_easy: 1.0 (uniform, seed 0) against 2.0"),
        (
            {"n_shot": {"arc_easy": 5, "gsm8k": 0}},
            "number of few-shot examples of gsm8k: 5 (uniform, seed 0) against 0",
        ),
        (
            {"chat_template_sha": "abc"},
            "chat template of arc_easy: none (uniform, seed 0) against abc (waterfill, seed 0)",
        ),
    ],
)
def test_different_questions_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(AdaptiveLoraError) as error:
        al.compare(two_runs(tmp_path, **changes))
    assert says in str(error.value)


def test_different_tasks_documents_and_directions_are_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "uniform", {"gsm8k": {"acc": answers(0.6)}})
    other = write_run(tmp_path / "waterfill", {"arc": {"acc": answers(0.6)}})
    same = write_run(tmp_path / "third", {"gsm8k": {"acc": answers(0.6)}})
    for path in same.rglob("samples_*"):
        path.write_text(path.read_text("utf-8").replace('"doc_hash": "', '"doc_hash": "0'), encoding="utf-8")
    mixed = [
        write_run(tmp_path / f"m{n}", {"a": {"acc": answers(0.6)}, "b": {"ter": 50 * answers(0.5)}}) for n in (0, 1)
    ]
    for path in (path for folder in mixed for path in folder.rglob("results_*")):
        results = json.loads(path.read_text("utf-8"))
        results["higher_is_better"]["b"]["ter"] = False
        path.write_text(json.dumps(results), encoding="utf-8")
    for runs, options, says in (
        ([one, other], {}, "no task in common (uniform, seed 0: gsm8k; waterfill, seed 0: arc)"),
        ([one, same], {}, "task gsm8k: the runs share no example (number and hash of the document)"),
        ([one, f"uniform={other}"], {}, "two folders are method uniform, seed 0"),
        (mixed, {}, "the mean over these tasks means nothing, since their scores have different directions"),
        (mixed, {"tasks": ["c"]}, "unknown task 'c'"),
        (mixed, {"metrics": ["f1"]}, "task a: unknown metric 'f1'"),
        (mixed, {"filters": ["strict"]}, "task a: unknown filter 'strict'"),
        (mixed, {"columns": {"score": "x"}}, "columns: not for lm-eval folders"),
        (mixed, {"tasks": ["b"], "higher_is_better": True}, "its task says that lower is better"),
    ):
        with pytest.raises(AdaptiveLoraError) as error:
            al.compare(runs, **options)
        assert says in str(error.value)
