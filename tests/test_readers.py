"""Readers take values as they are written: rows in are rows out, whatever the format."""

from __future__ import annotations

import csv
import datetime
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptive_lora.config import DataConfig
from adaptive_lora.data import load_examples
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.data.reading import Table, read_table
from adaptive_lora.data.rows import scalar_text
from adaptive_lora.errors import DataError

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table_of(path: str, **options: Any) -> Table:
    return read_table(DataConfig(data=path, **options))


def answers(path: str, **options: Any) -> list[str]:
    """Return the responses that are learned of a file."""
    return [e.response for e in load_examples(DataConfig(data=path, **options)).examples]


# --- JSON

NUMBERS = (
    "1", "1.5", "2", "2.50", "-0", "0.0", "1e3", "1E-7", "9223372036854775808",
    "12345678901234567890123", "0.1000000000000000055511151231257827", "true", "false",
)  # fmt: skip
TEXTS = ("2021-05-01", "007", "1.50", "NA", "null", "2021-05-01T10:00:00", "1_000", "True", "0x1f")


@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '[\n{"question": "a", "answer": 1},\n{"question": "b", "answer": 2}\n]',
         "is one list over several lines"),
        ("a.json", '{"version": 1, "data": [\n{"question": "a", "answer": 1},\n'
         '{"question": "b", "answer": 2}\n]}', "keys: version, data"),
    ],
)  # fmt: skip
def test_one_value_over_lines_is_no_file_of_rows(
    tmp_path: Path, name: str, text: str, says: str, on_bad_row: str
) -> None:
    """Its last row stands on a line of its own, and would be all that is learned."""
    with pytest.raises(DataError, match=says):
        answers(written(tmp_path, name, text), on_bad_row=on_bad_row)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "set/train.jsonl", "set/train.json"])
def test_json_values_are_learned_as_the_file_writes_them(tmp_path: Path, name: str) -> None:
    values = [*NUMBERS, *map(json.dumps, TEXTS)]
    rows = [f'{{"question": "{n}?", "answer": {value}}}' for n, value in enumerate(values)]
    text = "[" + ",\n".join(rows) + "]" if name.endswith(".json") else "\n".join(rows)
    path = written(tmp_path, name, text)
    data = str(tmp_path / "set") if name.startswith("set") else path
    assert answers(data) == [*NUMBERS, *TEXTS]


def test_rows_with_other_keys_and_types_of_a_column(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": 1},
        {"question": 2021, "answer": "2021-05-01", "id": {"a": [1, "b"]}},
        {"answer": 0.5, "question": True, "note": [1, {"x": None}]},
    ]
    path = written(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert table_of(path).columns == ("question", "answer", "id", "note")
    assert list(table_of(path).rows) == rows
    assert answers(path) == ["1", "2021-05-01", "0.5"]
    prompts = [e.prompt for e in load_examples(DataConfig(data=path)).examples]
    assert "### Instruction:\n2021\n" in prompts[1]
    assert "### Instruction:\ntrue\n" in prompts[2]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]))
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
COLUMN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
JSON_ROWS = st.lists(st.dictionaries(COLUMN, JSON_VALUES, min_size=1, max_size=4), min_size=1, max_size=6)


@in_one_folder
@given(JSON_ROWS, st.booleans(), st.sampled_from([None, 1]))
def test_json_rows_in_are_rows_out(tmp_path: Path, rows: list[dict[str, Any]], lines: bool, indent: int | None) -> None:
    if lines:
        path = written(tmp_path, "rows.jsonl", "\n".join(json.dumps(row) for row in rows))
    else:
        path = written(tmp_path, "rows.json", json.dumps(rows, indent=indent))
    found = table_of(path)
    assert list(found.rows) == rows
    assert [
        {key: scalar_text(value) for key, value in row.items() if isinstance(value, int | float)} for row in found.rows
    ] == [{key: json.dumps(value) for key, value in row.items() if isinstance(value, int | float)} for row in rows]


# --- CSV and TSV

CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@in_one_folder
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_csv_rows_in_are_rows_out(tmp_path: Path, rows: list[tuple[str, str, str]], end: str) -> None:
    path = tmp_path / "rows.csv"
    # Before Python 3.13 the writer leaves a carriage return alone without quotes.
    bare = any("\r" in cell for row in rows for cell in row)
    quoting = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end, quoting=quoting)
        writer.writerows([("a", "b", "c"), *rows])
    assert [tuple(row.values()) for row in table_of(str(path)).rows] == rows


TSV_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), max_size=8)


@in_one_folder
@given(st.lists(st.tuples(TSV_CELL, TSV_CELL), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_tsv_rows_in_are_rows_out(tmp_path: Path, rows: list[tuple[str, str]], end: str) -> None:
    text = end.join("\t".join(row) for row in [("a", "b"), *rows])
    path = written(tmp_path, "rows.tsv", text)
    assert [tuple(row.values()) for row in table_of(path).rows] == rows


def test_quotes_are_text_in_tsv(tmp_path: Path) -> None:
    lines = ["question\tanswer", *(f"what {n}?\tanswer {n}" for n in range(40))]
    lines[8] = '"what a start?\tanswer 7'
    lines[15] = 'the end" of it?\tanswer 14'
    lines[20] = '"in quotes"\tanswer "19"'
    path = written(tmp_path, "rows.tsv", "\n".join(lines) + "\n")
    assert len(answers(path)) == 40
    assert table_of(path).rows[7]["question"] == '"what a start?'
    assert table_of(path).rows[19] == {"question": '"in quotes"', "answer": 'answer "19"'}
    assert table_of(path).notes == (
        "1 rows have fields in quotes, which are text in TSV",
        "1 rows have fields that begin with a quote and do not end with one; they are text in "
        "TSV, and each line is a row",
    )


@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_a_first_field_over_two_lines_is_refused(tmp_path: Path, on_bad_row: str) -> None:
    path = written(tmp_path, "rows.tsv", 'question\tanswer\n"a\nb"\tc\nd\te\n')
    with pytest.raises(DataError, match="line 2: a field seems to span lines"):
        table_of(path, on_bad_row=on_bad_row)


def test_a_carriage_return_alone_ends_no_line_beside_line_feeds(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text\na\rb\nc\n")
    with pytest.raises(DataError, match="line 2: a carriage return outside quotes"):
        table_of(path, on_bad_row="skip")
    path = written(tmp_path, "rows.csv", 'text\n"a\rb"\nc\n"x\n')
    with pytest.raises(DataError, match="line 4: unexpected end of data"):
        table_of(path)
    for name in ("rows.csv", "rows.tsv"):
        path = written(tmp_path, name, "text\ra\rb\r")
        assert [row["text"] for row in table_of(path).rows] == ["a", "b"]


def test_csv_has_long_fields_and_lines_in_quotes(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = 'question,answer\r\n"a ""b""\nc, d","' + "x" * 200_000 + '"\r\nsaid "so",y\r\n'
    path = written(tmp_path, "rows.csv", text)
    found = table_of(path)
    assert found.rows[0]["question"] == 'a "b"\nc, d'
    assert len(found.rows[0]["answer"]) == 200_000
    assert found.rows[1] == {"question": 'said "so"', "answer": "y"}
    assert list(found.places) == ["line 2", "line 4"]
    assert csv.field_size_limit() == limit


def test_an_open_quote_is_named_with_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", 'question,answer\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match="lines 3 to 4: unexpected end of data; required RFC 4180"):
        table_of(path)


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    for name, text in {
        "rows.csv": "\nquestion,answer\n\na,b\n\n",
        "rows.tsv": "question\tanswer\n\na\tb\n\n",
        "rows.jsonl": '\n{"question": "a", "answer": "b"}\n\n',
    }.items():
        found = table_of(written(tmp_path, name, text))
        assert len(found.rows) == 1
        assert found.notes == ("2 blank lines",), name


# --- Parquet and hub sets


def test_parquet_values_are_learned_as_their_types_write_them(tmp_path: Path) -> None:
    columns = {
        "float": pyarrow.array([1.1, 2.5], pyarrow.float32()),
        "double": pyarrow.array([0.1, 1e22], pyarrow.float64()),
        "large": pyarrow.array([2**64 - 1, 7], pyarrow.uint64()),
        "money": pyarrow.array([Decimal("1.50"), Decimal("2.00")]),
        "flag": pyarrow.array([True, False]),
        "text": pyarrow.array(["007", "2021-05-01"]),
    }
    wanted = {
        "float": ["1.1", "2.5"],
        "double": ["0.1", "1e+22"],
        "large": ["18446744073709551615", "7"],
        "money": ["1.50", "2.00"],
        "flag": ["true", "false"],
        "text": ["007", "2021-05-01"],
    }
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b"], **columns}), path)
    for column, texts in wanted.items():
        options = {"prompt_column": "question", "response_column": column}
        assert answers(str(path), **options) == texts, column


def test_dates_of_parquet_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"question": ["a"], "answer": [datetime.date(2021, 5, 1)]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="row 0: column 'answer' must be text, got date"):
        answers(str(path))


def test_parquet_does_not_add_keys_to_objects(tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}],
        [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks}), path)
    assert [row["messages"] for row in table_of(str(path)).rows] == talks
    assert all(not e.full_messages for e in load_examples(DataConfig(data=str(path))).examples)


def test_no_library_guesses_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files without types never reach a reader that would give them some."""
    monkeypatch.setattr(datasets, "load_dataset", None)
    for name, text in {
        "a.jsonl": '{"question": "a", "answer": "2021-05-01"}',
        "a.csv": "question,answer\na,2021-05-01",
        "a.tsv": "question\tanswer\na\t2021-05-01",
        "set/train.jsonl": '{"question": "a", "answer": "2021-05-01"}',
    }.items():
        path = Path(written(tmp_path, name, text))
        assert answers(str(path.parent if "/" in name else path)) == ["2021-05-01"]


# --- labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((2, 10, 2), ("2", "10")),
        (("2", "10", "2"), ("10", "2")),
        ((True, False, True), ("false", "true")),
        (("007", "7", "007"), ("007", "7")),
        ((0.5, 1, 0.5), ("0.5", "1")),
    ],
)
def test_classes_are_named_as_written(tmp_path: Path, labels: tuple[Any, ...], names: tuple[str, ...]) -> None:
    rows = [json.dumps({"text": f"t{n}", "label": label}) for n, label in enumerate(labels)]
    path = written(tmp_path, "rows.jsonl", "\n".join(rows))
    found = load_labelled(DataConfig(data=path), numbers=False)
    assert found.labels == names
    wanted = [json.dumps(label) if not isinstance(label, str) else label for label in labels]
    assert [e.response for e in found.examples] == wanted


def test_numbers_to_predict(tmp_path: Path) -> None:
    rows = ['{"text": "a", "score": 1}', '{"text": "b", "score": 2.50}', '{"text": "c", "score": "3"}']
    path = written(tmp_path, "rows.jsonl", "\n".join(rows))
    found = load_labelled(DataConfig(data=path), numbers=True)
    assert [e.target for e in found.examples] == [1.0, 2.5, 3.0]
    assert all(type(e.target) is float and math.isfinite(e.target) for e in found.examples)
    for value in ("1_000", "\u0663", "0x10", "1,5", "nan"):  # of which Python's float takes two
        path = written(tmp_path, "rows.jsonl", json.dumps({"text": "a", "score": value}))
        with pytest.raises(DataError, match="'score' must be a number"):
            load_labelled(DataConfig(data=path), numbers=True)
    path = written(tmp_path, "rows.jsonl", '{"text": "a", "score": 1' + "0" * 400 + "}")
    with pytest.raises(DataError, match="'score' must be a number"):
        load_labelled(DataConfig(data=path), numbers=True)


def test_lists_of_labels_are_refused_as_such(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", '{"text": "a", "label": ["x", "y"]}\n')
    with pytest.raises(DataError, match="values of the type list; required one class per row"):
        load_labelled(DataConfig(data=path), numbers=False)
