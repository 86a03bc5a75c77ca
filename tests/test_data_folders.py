"""Folders laid out like hub sets, their cards, and files and folders of any name."""

from __future__ import annotations

import errno
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from test_readers import answers, table_of, written

from adaptive_lora.config import DataConfig
from adaptive_lora.data import load_examples
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.errors import DataError


def test_csv_and_tsv_files_of_a_folder_are_read_as_local_ones(tmp_path: Path) -> None:
    written(tmp_path, "one/train.csv", "question,answer\n2021-05-01,007\nNA,1.50\n")
    assert answers(str(tmp_path / "one")) == ["007", "1.50"]
    written(tmp_path, "two/train.tsv", 'question\tanswer\n"a\t007\nb" c\tNA\n')
    assert answers(str(tmp_path / "two")) == ["007", "NA"]
    written(tmp_path, "two/test.tsv", "question\tanswer\nx\ty\n")
    found = load_examples(DataConfig(data=str(tmp_path / "two"), test_split="test"))
    assert found.test is not None
    assert [e.response for e in found.test] == ["y"]
    assert answers(str(tmp_path / "two"), data_split="train[:1]+test") == ["007", "y"]


def test_several_files_of_a_split_keep_their_places(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl"):
        written(tmp_path, f"set/{name}", '{"question": "a", "answer": 1}\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"2 rows cannot be used:\n.*train-0\.jsonl line 2"):
        answers(str(tmp_path / "set"))


@pytest.mark.parametrize(("name", "rows"), [
    ("train.csv", "text,label\na,0\nb,1\n007,good\n"),
    ("train.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
                    '{"text": "007", "label": "good"}\n'),
])  # fmt: skip
def test_classes_that_a_card_declares_are_taken(tmp_path: Path, name: str, rows: str) -> None:
    written(tmp_path, f"set/{name}", rows)
    card = (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': bad\n          '1': good\n"
        "---\n"
    )
    written(tmp_path, "set/README.md", card)
    found = load_labelled(DataConfig(data=str(tmp_path / "set")), numbers=False)
    assert found.labels == ("bad", "good")
    assert [e.response for e in found.examples] == ["bad", "good", "good"]
    assert found.examples[2].prompt == "007"


def test_classes_that_are_named_by_numbers_are_found_by_index_or_name(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["1", "0"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    path = str(tmp_path / "rows.parquet")
    rows = {"text": ["a", "b"], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    found = load_labelled(DataConfig(data=path), numbers=False)
    assert [e.response for e in found.examples] == ["1", "0"]


def test_other_types_of_a_card_change_no_value(tmp_path: Path) -> None:
    rows = '{"question": "a", "answer": 1.50}\n{"question": "b", "answer": 9223372036854775808}\n'
    written(tmp_path, "set/train.jsonl", rows)
    written(tmp_path, "set/README.md", "---\ndataset_info:\n  features:\n  - name: question\n"
            "    dtype: string\n  - name: answer\n    dtype: string\n---\n")  # fmt: skip
    assert answers(str(tmp_path / "set")) == ["1.50", "9223372036854775808"]


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    rows = '{"question": "a", "answer": 1}\n'
    for name in ("train.jsonl", "test.jsonl", "README.md", ".hidden"):
        written(tmp_path, f"set/{name}", "" if name == ".hidden" else rows)
    folder = str(tmp_path / "set")
    assert table_of(folder).notes == ()
    written(tmp_path, "set/more.csv", "question,answer\nb,2\n")
    assert table_of(folder).notes == ("1 files of the folder are not read: more.csv",)


# --- names of files


@pytest.mark.parametrize("name", ["a[0-9]", "a*", "a?", "x::y", "100%20", "a b", "é'\"#", "~", "a\nb"])
def test_a_file_of_any_name_is_read_and_no_other(tmp_path: Path, name: str) -> None:
    def parquet(path: Path, answer: str) -> str:
        pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": [answer]}), path)
        return str(path)

    parquet(tmp_path / "a1.parquet", "another")
    assert answers(parquet(tmp_path / f"{name}.parquet", "own")) == ["own"]
    assert answers(written(tmp_path, f"{name}.csv", "question,answer\nq,own\n")) == ["own"]


@pytest.mark.parametrize("name", ["a[0-9]", "a*", "x::y", "a\nb"])
def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    for folder in (name, "a1"):
        written(tmp_path, f"{folder}/train.csv", "question,answer\nq,a\n")
    with pytest.raises(DataError, match="rename it"):
        answers(str(tmp_path / name))


def test_a_folder_may_end_as_a_file_does(tmp_path: Path) -> None:
    written(tmp_path, "set.csv/train.csv", "question,answer\nq,a\n")
    assert answers(str(tmp_path / "set.csv")) == ["a"]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = written(tmp_path, "rows.csv", "question,answer\nq,a\n")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"rows\.csv cannot be read: Permission denied"):
        answers(path)


def test_a_card_that_changes_how_files_are_read_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "set/train.csv", "a;b\n")
    written(tmp_path, "set/README.md", "---\nconfigs:\n- config_name: x\n  data_files: train.csv\n"
            "  sep: ';'\n---\n")  # fmt: skip
    with pytest.raises(DataError, match="its card sets sep"):
        answers(str(tmp_path / "set"))
