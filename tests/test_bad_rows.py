"""One bad row does not end a study: refused with all others at once, or left out and counted."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import rows
from task_studies import study_of

from adaptive_lora.config import DataConfig, study_from
from adaptive_lora.data import load_examples
from adaptive_lora.data.images import load_classes
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.data.rows import drawn
from adaptive_lora.errors import DataError
from adaptive_lora.runner.context import StudyContext

Row = dict[str, Any]
Make = Callable[..., StudyContext]
EMPTY = "column 'output' is empty"


def save(folder: Path, table: list[Row], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return str(path)


def with_bad(count: int, bad: dict[int, Row]) -> list[Row]:
    """Return Alpaca rows of which some are changed."""
    return [{**row, **bad.get(number, {})} for number, row in enumerate(rows(count))]


def config(data: str, **options: Any) -> DataConfig:
    return study_from({"data": data, "template": "compact", **options}).data


# --- refused


def test_all_problems_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    bad = {3: {"output": ""}, 5: {"output": ["a"]}, 7: {"instruction": None}, 9: {"output": "a\0"}}
    with pytest.raises(DataError) as caught:
        load_examples(config(save(tmp_path, with_bad(12, bad))))
    assert str(caught.value).splitlines() == [
        "rows.jsonl: 4 rows cannot be used:",
        "  rows.jsonl line 4: column 'output' is empty.",
        "  rows.jsonl line 6: column 'output' must be text, got list.",
        "  rows.jsonl line 8: column 'instruction' is empty.",
        "  rows.jsonl line 10: column 'output' holds a NUL sign or an unpaired surrogate.",
        "Correct the data, or leave such rows out with --on-bad-row skip.",
    ]


def test_at_most_twenty_are_named(tmp_path: Path) -> None:
    data = save(tmp_path, with_bad(40, {n: {"output": "  "} for n in range(30)}))
    with pytest.raises(DataError) as caught:
        load_examples(config(data))
    text = str(caught.value)
    assert re.findall(r"line (\d+):", text) == [str(n) for n in range(1, 21)]
    assert "rows.jsonl: 30 rows cannot be used" in text
    assert "... and 10 more" in text


def test_prompts_without_room_are_all_named(tmp_path: Path, make_bench: Make) -> None:
    data = save(tmp_path, with_bad(40, {n: {"instruction": "x" * 200} for n in (4, 17, 30)}))
    with pytest.raises(DataError) as caught:
        make_bench(data=data)
    assert re.findall(r"line (\d+): no supervised token", str(caught.value)) == ["5", "18", "31"]
    assert "--on-bad-row skip" in str(caught.value)


# --- only rows that are used are judged


def test_rows_that_are_not_drawn_are_not_judged(tmp_path: Path) -> None:
    clean = config(save(tmp_path, rows(60), "clean.jsonl"), max_examples=10)
    chosen = set(drawn(60, clean))
    assert len(chosen) == 10
    others = sorted(set(range(60)) - chosen)
    bad = {n: {"output": "", "instruction": {"no": "text"}} for n in others}
    data = config(save(tmp_path, with_bad(60, bad)), max_examples=10)
    assert load_examples(data).digest == load_examples(clean).digest
    one = sorted(chosen)[0]
    data = config(save(tmp_path, with_bad(60, {one: {"output": ""}})), max_examples=10)
    with pytest.raises(DataError, match=rf"line {one + 1}: {EMPTY}"):
        load_examples(data)
    left = load_examples(dataclasses.replace(data, on_bad_row="skip"))
    assert len(left.examples) == 9
    assert (left.readings[0].rows, left.readings[0].drawn) == (60, 10)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.json"])
def test_lines_that_are_not_drawn_are_not_judged(tmp_path: Path, name: str) -> None:
    def lines(bad: int | None) -> str:
        table = [(f"q{n}", f"a{n}") for n in range(30)]
        mark = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
        if mark:
            texts = [mark.join(row) for row in table]
            head, joint, tail = f"question{mark}answer\n", "\n", "\n"
        else:
            texts = [json.dumps({"question": q, "answer": a}) for q, a in table]
            head, joint, tail = ("[", ",\n", "]") if path.suffix == ".json" else ("", "\n", "\n")
        if bad is not None:
            texts[bad] = "7"
        return head + joint.join(texts) + tail

    path = tmp_path / name
    settings = config(str(path), max_examples=8)
    path.write_text(lines(None), encoding="utf-8")
    clean = load_examples(settings)
    chosen = set(drawn(30, settings))
    path.write_text(lines(min(set(range(30)) - chosen)), encoding="utf-8")
    found = load_examples(settings)
    assert found.digest == clean.digest
    assert (found.readings[0].rows, found.readings[0].drawn) == (30, 8)
    path.write_text(lines(min(chosen)), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"{name} ")):
        load_examples(settings)
    left = load_examples(dataclasses.replace(settings, on_bad_row="skip"))
    assert len(left.examples) == 7
    assert [e.id for e in left.examples] == [e.id for e in clean.examples][1:]


def test_prompts_that_the_test_part_has_are_not_judged(tmp_path: Path, make_bench: Make) -> None:
    long = {"instruction": "x" * 200}
    tested = save(tmp_path, rows(8), "test.jsonl")
    data = save(tmp_path, [*with_bad(40, {}), {**rows(1)[0], "output": "y" * 500}])
    context = make_bench(data=data, test_data=tested)
    assert context.data_summary.tested_prompts == 9
    with pytest.raises(DataError, match=r"test\.jsonl line 3: no supervised token"):
        make_bench(data=data, test_data=save(tmp_path, with_bad(8, {2: long}), "test.jsonl"))


# --- left out


def test_the_rest_is_what_a_file_without_them_gives(
    tmp_path: Path, make_bench: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bad: dict[int, Row] = {2: {"output": ""}, 11: {"instruction": "x" * 200}, 30: {"output": {}}}
    data = save(tmp_path, with_bad(40, bad))
    clean = save(tmp_path, [row for n, row in enumerate(rows(40)) if n not in bad], "clean.jsonl")
    with caplog.at_level(logging.WARNING):
        skipped = make_bench(data=data, on_bad_row="skip")
    whole = make_bench(data=clean)
    assert skipped.splits(0) == whole.splits(0)
    assert skipped.data.digest == whole.data.digest
    assert skipped.data.reasons == {
        EMPTY: 1,
        "column 'output' must be text, got dict": 1,
        "prompts leave no room for a response within max_tokens": 1,
    }
    assert [row.where for row in skipped.data.readings[0].left_out] == [
        "rows.jsonl line 3", "rows.jsonl line 31", "rows.jsonl line 12",
    ]  # fmt: skip
    assert f"left out: rows.jsonl line 3: {EMPTY}" in caplog.text
    assert "left out: rows.jsonl line 12: prompts leave no room" in caplog.text


def test_rows_left_out_are_part_of_the_identity(tmp_path: Path, make_bench: Make) -> None:
    clean = save(tmp_path, rows(40))
    plain, skipping = make_bench(data=clean), make_bench(data=clean, on_bad_row="skip")
    (trial, *_), (same, *_) = plain.config.trials(), skipping.config.trials()
    assert plain.study_id == skipping.study_id
    assert plain.signature(trial) == skipping.signature(same)
    assert plain.study_key == skipping.study_key
    lossy = make_bench(data=save(tmp_path, [*rows(40), {"instruction": "a", "output": ""}]), on_bad_row="skip")
    assert lossy.data.digest == plain.data.digest
    assert lossy.study_id != plain.study_id
    assert lossy.signature(same) != plain.signature(trial)
    assert lossy.study_key == plain.study_key  # so that the change is said


def test_lines_that_are_no_row_can_be_left_out(tmp_path: Path) -> None:
    for name, text in {
        "a.jsonl": '{"question": "a", "answer": 1}\n{"que\n[1]\n{"question": "b", "answer": 2}',
        "b.csv": "question,answer\na,1\nb,2,3\nc\nb,2\n",
        "c.tsv": "question\tanswer\na\t1\nb\t2\t3\nc\nb\t2\n",
        "d.json": '[{"question": "a", "answer": 1}, 2, [],\n {"question": "b", "answer": 2}]',
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=rf"{name}: 2 rows cannot be used"):
            load_examples(config(str(tmp_path / name)))
        found = load_examples(config(str(tmp_path / name), on_bad_row="skip"))
        assert [e.response for e in found.examples] == ["1", "2"]
        assert len(found.readings[0].left_out) == 2
        assert found.readings[0].rows == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"question": "a", "answer": 1}, {"question": '),
        ("a.csv", 'question,answer\na,1\n"b,2\nc,3\n'),
        ("a.tsv", 'question\tanswer\na\t"1\n2"\nc\t3\n'),
    ],
)
def test_files_whose_rows_cannot_be_told_apart_are_always_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="line"):
        load_examples(config(str(tmp_path / name), on_bad_row="skip"))


def test_nothing_left_is_an_error(tmp_path: Path, make_bench: Make) -> None:
    data = save(tmp_path, with_bad(5, {n: {"output": ""} for n in range(5)}))
    with pytest.raises(DataError, match=f"every row is left out: {EMPTY}"):
        load_examples(config(data, on_bad_row="skip"))
    (tmp_path / "no.jsonl").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(DataError, match="every row is left out: not JSON"):
        load_examples(config(str(tmp_path / "no.jsonl"), on_bad_row="skip"))
    data = save(tmp_path, with_bad(9, {n: {"instruction": "x" * 200} for n in range(9)}))
    with pytest.raises(DataError, match="every row is left out: prompts leave no room"):
        make_bench(data=data, on_bad_row="skip")


def test_labels_and_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    table = [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(10)]
    table[3] = {"text": "", "label": "a"}
    table[4] = {"text": "x", "label": None}  # type: ignore[dict-item]
    table[5] = {"text": "x", "label": ["a"]}  # type: ignore[dict-item]
    data = config(save(tmp_path, table))
    with pytest.raises(DataError, match="3 rows cannot be used") as caught:
        load_labelled(data, numbers=False)
    assert re.findall(r"line (\d+)", str(caught.value)) == ["4", "5", "6"]
    found = load_labelled(dataclasses.replace(data, on_bad_row="skip"), numbers=False)
    assert (found.labels, len(found.examples)) == (("a", "b"), 7)
    weighted = [{**row, "weight": 0 if n == 2 else 1.0} for n, row in enumerate(table[:3])]
    with pytest.raises(DataError, match="line 3: column 'weight' changes what is learned"):
        load_labelled(config(save(tmp_path, weighted)), numbers=False)
    numbers = [{"text": "a", "score": value} for value in (1, "x", None, True, 2.5)]
    data = config(save(tmp_path, numbers), on_bad_row="skip")
    assert [e.target for e in load_labelled(data, numbers=True).examples] == [1.0, 1.0, 2.5]


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    options = study_of("image_classification", tmp_path)
    data = Path(str(options["data"]))
    table = json.loads(data.read_text(encoding="utf-8"))
    (data.parent / "broken.png").write_bytes(b"no picture")
    table[2]["image"], table[5]["image"] = "broken.png", "nowhere.png"
    data.write_text(json.dumps(table), encoding="utf-8")
    read = study_from(options).data
    with pytest.raises(DataError, match=r"2 rows cannot be used") as caught:
        load_classes(read)
    assert re.findall(r"item (\d+)", str(caught.value)) == ["2", "5"]
    found = load_classes(dataclasses.replace(read, on_bad_row="skip"))
    assert len(found.examples) == len(table) - 2
    assert found.reasons == {"column 'image' holds no image that can be read": 2}
