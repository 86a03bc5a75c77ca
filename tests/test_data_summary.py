"""Nothing is ignored in silence: what is read, left out, cut and learned is said and kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import rows
from task_studies import TASKS, study_of
from test_bad_rows import save
from tracked import Finished, runs_in, trials_in, words_of

from adaptive_lora.cli import main
from adaptive_lora.config import DataConfig, study_from
from adaptive_lora.data import load_examples
from adaptive_lora.data.summary import reading_lines, shortened
from adaptive_lora.errors import ConfigError, DataError
from adaptive_lora.runner.context import StudyContext

Make = Callable[..., StudyContext]


def test_the_block(tmp_path: Path, make_bench: Make) -> None:
    table = [{**row, "id": n, "source": "x"} for n, row in enumerate(rows(40))]
    table[6]["output"] = ""
    context = make_bench(
        data=save(tmp_path, table),
        test_data=save(tmp_path, rows(6), "test.jsonl"),
        on_bad_row="skip",
        image_column="picture",
        loss_on="response",
    )
    parts = context.splits(0)
    sizes = [
        f"{name} {len(part)} examples ({sum(e.supervised_tokens for e in part)} supervised)"
        for name, part in (
            ("train", parts.train), ("validation", parts.validation), ("test", parts.test),
        )
    ]  # fmt: skip
    lines = context.data_lines()
    assert lines[:9] == [
        "data      rows.jsonl: 40 rows",
        "columns   instruction: prompt, input: input, output: response; not used: id, source",
        "left out  1 row: column 'output' is empty (first: rows.jsonl line 7)",
        "          options that these data do not use: --image-column",
        "test data test.jsonl: 6 rows",
        "columns   instruction: prompt, input: input, output: response",
        "          options that these data do not use: --image-column",
        "task      causal; template: compact",
        f"splits    {', '.join(sizes)}",
    ]
    assert lines[9] == "          6 examples removed: their prompt is also in the test split"
    assert lines[10].startswith("cut       none of 39 examples at 120 tokens")
    first = parts.train[0]
    where = context.data_summary.where
    row = table[int(where.split()[-1]) - 1]
    assert where.startswith("rows.jsonl line ")
    assert lines[11] == f"example   {where}, supervised text in [[ ]]:"
    shown = "\n".join(line.removeprefix("  | ") for line in lines[12:])
    assert shown.endswith(f"### Response:\n[[{row['output']}<|endoftext|>]]")
    assert f"### Instruction:\n{row['instruction']}\n" in shown
    assert len(first.input_ids) == len(shown) - len("[[]]") - len("<|endoftext|>") + 1  # bytes


# --- cuts, on every task


@pytest.mark.parametrize("task", [task for task in TASKS if task != "image_classification"])
def test_cuts_are_counted_on_every_task(task: str, tmp_path: Path) -> None:
    options = {**study_of(task, tmp_path), "methods": "uniform:rank=2"}
    whole = StudyContext(study_from(options)).data_summary
    assert whole.cut_examples == whole.lost_tokens == 0
    lengths = [e.length for part in vars_of(StudyContext(study_from(options))) for e in part]
    limit = max(lengths) - 1 if task != "seq2seq" else 9
    context = StudyContext(study_from({**options, "max_tokens": limit}))
    summary = context.data_summary
    kept = sum(e.length for part in vars_of(context) for e in part)
    assert summary.cut_examples > 0
    assert summary.lost_tokens == sum(lengths) - kept
    assert summary.tokens == kept
    assert summary.share_lost == summary.lost_tokens / sum(lengths)
    text = next(line for line in context.data_lines() if line.startswith("cut"))
    assert f"{summary.cut_examples} of {summary.examples} examples at {limit} tokens" in text
    assert f"{summary.lost_tokens:,} of {sum(lengths):,} tokens" in text
    assert StudyContext(context.config).data_summary == summary  # from tokens on disk


def vars_of(context: StudyContext) -> list[tuple[Any, ...]]:
    parts = context.splits(0)
    return [parts.train, parts.validation, parts.test]


@pytest.mark.parametrize("task", TASKS)
def test_the_example_marks_what_is_learned(task: str, tmp_path: Path) -> None:
    context = StudyContext(study_from({**study_of(task, tmp_path), "methods": "uniform:rank=2"}))
    first = next(e for e in context.data.examples if e.where == context.data_summary.where)
    _, opened, learned = context.data_summary.example.partition("[[")
    assert opened
    if task == "token_classification":  # tags stand between the words
        assert re.findall(r"\[\[(.*?)\]\]", opened + learned) == first.response.split()
    else:
        assert first.response in learned
    assert learned.endswith("]]")
    texts = context.test_texts()
    tested = [e for e in context.data.examples if e.id in texts]
    assert len(tested) == len(context.splits(0).test)
    for e in tested:
        said = (e.prompt, e.second, e.question, e.response)
        assert all(text in texts[e.id] for text in said if text)


def test_long_examples_are_shortened() -> None:
    assert shortened("a" * 1500) == "a" * 1500
    text = shortened("a" * 5000 + "b" * 5000)
    assert len(text) < 1600
    assert "8,500 characters" in text


def test_of_many_columns_the_first_are_named(tmp_path: Path) -> None:
    more = {f"c{n}": "x" for n in range(300)}
    data = save(tmp_path, [{**row, **more} for row in rows(5)])
    (_, columns) = reading_lines(load_examples(DataConfig(data=data)).readings)
    assert columns.endswith("c28, c29 and 270 more")


# --- kept with study and trial


def test_the_block_is_printed_and_kept(finished: Finished) -> None:
    assert finished.shown.startswith("data      rows.json: 40 rows\n")
    assert finished.shown.count("data      rows.json") == 1
    folder = finished.client.download_artifacts(finished.parent.info.run_id, "data.json")
    record = json.loads(Path(folder).read_text(encoding="utf-8"))
    assert record["block"] == finished.shown.split("\n")[: len(record["block"])]
    assert record["sources"][0]["columns"] == {
        "instruction": "prompt", "input": "input", "output": "response",
    }  # fmt: skip
    for run in finished.children:
        assert run.data.params["data.rows_read"] == "40"
        assert run.data.params["data.rows_left_out"] == "0"
        assert run.data.params["data.template"] == "compact"
        assert run.data.params["data.examples_cut"] == "0"
        assert run.data.params["data.share_of_tokens_cut"] == "0.0"
    report = finished.folder / finished.outcome.study_result.report()
    assert "data      rows.json: 40 rows" in report.read_text(encoding="utf-8")
    assert "    data      rows.json: 40 rows" in report.with_name("report.md").read_text("utf-8")


def test_a_trial_keeps_its_cuts(options: dict[str, object], tmp_path: Path) -> None:
    options["data"] = save(tmp_path, [{"text": f"{n} " + "abcd " * n} for n in range(40)])
    given = {k: v for k, v in options.items() if k not in ("methods", "seeds", "template")}
    words = words_of({**given, "max_tokens": 60, "method": "uniform:rank=2"})
    result = CliRunner().invoke(main, ["train", *words])
    assert result.exit_code == 0, result.output
    lengths = [len(f"{n} " + "abcd " * n) + 1 for n in range(40)]
    lost = sum(max(0, length - 60) for length in lengths)
    assert f"{lost:,} of {sum(lengths):,} tokens ({lost / sum(lengths):.1%}) are lost" in result.output
    (trial,) = trials_in(tmp_path)
    assert trial.data.params["data.tokens_cut"] == str(lost)
    assert trial.data.params["data.examples_cut"] == str(sum(n > 60 for n in lengths))
    assert len(runs_in(tmp_path)) == 2


# --- keys that change meaning


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("system", "Be brief."), ("history", [["a", "b"]]), ("tools", [{"name": "x"}]),
        ("weight", 0), ("weight", 0.5), ("train", False), ("images", ["a.png"]),
        ("weight", "2"), ("train", "no"), ("sample_weight", 0.1), ("system_message", "Be brief."),
        ("chat_template_kwargs", {"enable_thinking": False}), ("system_prompt", "Be brief."),
    ],
)  # fmt: skip
def test_columns_that_change_what_is_learned_are_refused(tmp_path: Path, column: str, value: object) -> None:
    table: list[dict[str, Any]] = [{**row, column: None} for row in rows(5)]
    found = load_examples(DataConfig(data=save(tmp_path, table)))
    assert found.readings[0].unused == (column,)
    table[3][column] = value
    with pytest.raises(DataError, match=f"line 4: column '{column}' changes what is learned"):
        load_examples(DataConfig(data=save(tmp_path, table)))
    chosen = DataConfig(data=save(tmp_path, [{**row, column: "a"} for row in rows(5)]),
                        input_column=column)  # fmt: skip
    assert load_examples(chosen).readings[0].columns[column] == "input"


def test_values_that_say_what_holds_anyway_are_taken(tmp_path: Path) -> None:
    same = {"weight": "1.0", "train": "True", "loss_scale": 1, "system": "", "history": []}
    table = [{**row, **same} for row in rows(5)]
    assert len(load_examples(DataConfig(data=save(tmp_path, table))).examples) == 5


def test_a_labelled_table_asks_for_the_task(tmp_path: Path) -> None:
    table = [{"text": f"film {n}", "label": "ab"[n % 2]} for n in range(5)]
    data = save(tmp_path, table)
    with pytest.raises(ConfigError, match=r"labels 'label', which fit several tasks; required --ta"):
        load_examples(DataConfig(data=data))
    found = load_examples(DataConfig(data=data, task="causal"))
    assert found.readings[0].unused == ("label",)
    for columns in (("text", "Label"), ("sentence", "label"), ("sentence1", "score")):
        table = [dict(zip(columns, (f"film {n}", "ab"[n % 2]), strict=True)) for n in range(5)]
        with pytest.raises(ConfigError, match=f"labels '{columns[1]}', which fit several"):
            load_examples(DataConfig(data=save(tmp_path, table)))
