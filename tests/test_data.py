"""Data: every format, errors with their place, splits that do not leak, supervised tokens."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
from conftest import rows
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adaptive_lora.config import DataConfig, study_from
from adaptive_lora.data import (
    Example,
    collate,
    load_examples,
    load_template,
    split_examples,
    tokenize,
    training_batches,
)
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.errors import DataError
from adaptive_lora.serving import render


def data_config(**values: object) -> DataConfig:
    """Return a data configuration from option values."""
    return study_from(values).data


def write_json(path: Path, table: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(table), encoding="utf-8")


def write_jsonl(path: Path, table: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


def write_csv(path: Path, table: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def write_tsv(path: Path, table: list[dict[str, str]]) -> None:
    lines = ["\t".join(table[0]), *("\t".join(row.values()) for row in table)]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_parquet(path: Path, table: list[dict[str, str]]) -> None:
    pd.DataFrame(table).to_parquet(path)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    ".json": write_json,
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".parquet": write_parquet,
}


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    table = [*rows(5), {"instruction": "Say NA, null", "input": "", "output": 'a "b", c'}]
    digests = set()
    for suffix, write in WRITERS.items():
        write(tmp_path / f"data{suffix}", table)
        found = load_examples(data_config(data=str(tmp_path / f"data{suffix}")))
        assert [example.response for example in found.examples] == [row["output"] for row in table]
        digests.add(found.digest)
    assert len(digests) == 1


def test_dolly_columns(tmp_path: Path) -> None:
    table = [{"instruction": "Do", "context": "here", "response": "done", "category": "x"}]
    write_jsonl(tmp_path / "dolly.jsonl", table)
    example = load_examples(data_config(data=str(tmp_path / "dolly.jsonl"))).examples[0]
    assert "### Input:\nhere\n" in example.prompt
    assert example.response == "done"


def test_named_columns_and_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "qa.jsonl", [{"question": "1+1 {input}?", "answer": 2}])  # type: ignore[dict-item]
    config = data_config(
        data=str(tmp_path / "qa.jsonl"), prompt_column="question", response_column="answer", template="compact"
    )
    example = load_examples(config).examples[0]
    assert example.prompt == "### Instruction:\n1+1 {input}?\n\n### Response:\n"
    assert example.response == "2"


def test_own_template_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("with_input: 'Q {prompt} {input}'\nwithout_input: 'Q {prompt}'\n")
    assert render(load_template(str(path)), "a", "b") == "Q a b"
    path.write_text("with_input: 'Q {prompt}'\n")
    with pytest.raises(DataError, match="without_input"):
        load_template(str(path))
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        load_template("alpca")


def test_real_alpaca(shared_data: Path) -> None:
    found = load_examples(data_config(data=str(shared_data / "alpaca_en_demo.json")))
    assert len(found.examples) == 999
    assert "Below is an instruction" in found.examples[0].prompt
    assert len({example.id for example in found.examples}) == 999


def test_real_gsm8k(shared_data: Path) -> None:
    found = load_examples(data_config(data=str(shared_data / "gsm8k_train.jsonl")))
    assert len(found.examples) == 7473
    assert "### Instruction:\nNatalia sold clips" in found.examples[0].prompt
    assert found.examples[0].response.endswith("#### 72")


def test_real_tab_separated_file(shared_data: Path) -> None:
    config = data_config(data=str(shared_data / "sst2_dev.tsv"), prompt_column="content", response_column="label")
    assert len(load_examples(config).examples) == 872


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"instruction": "a",\n "output": }]', "line 2, column 12: not JSON"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instr', "line 2, column"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n[1]\n', "line 2: required one JSON"),
        ("a.json", '[{"instruction": "a", "output": "b"}, 3]', r"item 1 \(line 1\): required an object"),
        ("a.csv", "instruction,output\na,b\na,b,c\n", "line 3: required 2 fields, got 3"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "no examples|cannot be read"),
        ("a.txt", "hello", "required one of .json"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.jsonl", '{"words": "a"}\n', "required Alpaca columns"),
        ("a.jsonl", '{"instruction": "a", "output": " "}\n', "a.jsonl line 1: column 'output' is empty"),
        ("a.jsonl", '{"instruction": "", "output": "b"}\n', "column 'instruction' is empty"),
        ("a.jsonl", '{"instruction": "a", "output": ["b"]}\n', "must be text, got list"),
    ],
)
def test_bad_files_are_clear_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_examples(data_config(data=str(path)))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"instruction": "\xff"}]')
    with pytest.raises(DataError, match="UTF-8"):
        load_examples(data_config(data=str(path)))


@pytest.mark.parametrize("column", ["prompt_column", "response_column", "input_column"])
def test_missing_column_is_named(data_file: Path, column: str) -> None:
    with pytest.raises(DataError, match="missing nope"):
        load_examples(data_config(data=str(data_file), **{column: "nope"}))


def test_missing_file_and_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_examples(data_config(data="nowhere.json"))
    # The variable is read when the packages are imported, which other tests may have done.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="neither a local file nor reachable"):
        load_examples(data_config(data="nobody/nothing-at-all"))


def test_folder_laid_out_like_a_hub_set(tmp_path: Path) -> None:
    folder = tmp_path / "databricks-dolly-15k"
    folder.mkdir()
    row = {"instruction": "Do", "context": "", "response": "done", "category": "x"}
    write_jsonl(folder / "train.jsonl", [row] * 3)
    found = load_examples(data_config(data=str(folder)))
    assert len(found.examples) == 3
    with pytest.raises(DataError, match="validation"):
        load_examples(data_config(data=str(folder), data_split="validation"))


def test_subset_is_seeded(data_file: Path) -> None:
    one, same, other = (
        load_examples(data_config(data=str(data_file), max_examples=9, split_seed=seed)).digest for seed in (0, 0, 1)
    )
    assert one == same != other


def examples_of(prompts: list[str]) -> list[Example]:
    """Return one example a prompt, with running ids."""
    return [
        Example(id=str(index), prompt=prompt, response="r", where=f"row {index}")
        for index, prompt in enumerate(prompts)
    ]


@given(st.lists(st.sampled_from("abcdefghijklmnopqrst"), min_size=60, max_size=90), st.integers(0, 9))
def test_parts_never_share_a_prompt(prompts: list[str], seed: int) -> None:
    texts = [letter.upper() if index % 2 else f" {letter} " for index, letter in enumerate(prompts)]
    examples = examples_of(texts)
    config = data_config(validation_share=0.2, test_share=0.2, split_seed=seed)
    try:
        parts = split_examples(examples, config)
    except DataError:
        return
    keys = [{example.prompt.strip().lower() for example in part} for part in
            (parts.train, parts.validation, parts.test)]  # fmt: skip
    assert sum(map(len, keys)) == len(set.union(*keys))
    ids = [e.id for part in (parts.train, parts.validation, parts.test) for e in part]
    assert sorted(ids) == sorted(example.id for example in examples)


def test_folds_test_every_prompt_once() -> None:
    examples = examples_of([f"prompt {index}" for index in range(23)])
    config = data_config(folds=4, validation_share=0.1)
    tested = [e.id for fold in range(4) for e in split_examples(examples, config, fold).test]
    assert sorted(tested) == sorted(example.id for example in examples)


def test_too_few_prompts() -> None:
    with pytest.raises(DataError, match="2 different prompts leave the validation"):
        split_examples(examples_of(["a", "b", "A"]), data_config())


def test_labels_cover_the_response_and_the_end(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    example = Example(id="1", prompt="ab", response="cde", where="row 0")
    tokens = tokenize([example], tokenizer, max_tokens=50, loss_on="response")
    batch = collate(tokens, pad_id=257)
    kept = batch.labels[0][batch.labels[0] != IGNORED]
    assert tokenizer.decode(kept) == "cde<|endoftext|>"
    everything = tokenize([example], tokenizer, max_tokens=50, loss_on="all")[0]
    assert everything.supervised_tokens == 5  # all but the first token, which nothing predicts


def test_long_responses_are_cut_and_long_prompts_named(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    example = Example(id="1", prompt="abcd", response="e" * 99, where="x.json item 7")
    kept = tokenize([example], tokenizer, max_tokens=10, loss_on="response")[0]
    assert (len(kept.input_ids), kept.supervised_tokens) == (10, 6)
    with pytest.raises(DataError, match=r"x\.json item 7: no supervised token"):
        tokenize([example], tokenizer, max_tokens=4, loss_on="response")


def test_order_depends_on_seed_alone(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokens = tokenize(examples_of(list("abcdefg")), tokenizer, max_tokens=9, loss_on="all")

    def first(seed: int, count: int = 8) -> list[list[int]]:
        stream = training_batches(tokens, batch_size=2, seed=seed, collate=lambda rows: collate(rows, 257))
        return [next(stream).input_ids[:, 0].tolist() for _ in range(count)]

    assert first(1) == first(1)
    assert first(1) != first(2)
    epochs = first(1)
    first_epoch, second_epoch = (sorted(chain(*half)) for half in (epochs[:4], epochs[4:]))
    assert first_epoch == second_epoch
    assert epochs[:4] != epochs[4:]
