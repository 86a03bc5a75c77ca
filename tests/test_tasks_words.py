"""Tags of words, from a table to a proven and served adapter with its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console
from seqeval.metrics import f1_score, precision_score, recall_score
from task_bases import ENCODERS, run_and_prove, save_base, small_study, tagged_rows, write_rows
from task_studies import GPT2

from adaptive_lora.config import DataConfig
from adaptive_lora.data.labelled import class_names
from adaptive_lora.data.reading import read_table
from adaptive_lora.data.tagged import tag_names
from adaptive_lora.errors import DataError, ModelError
from adaptive_lora.models.tasks.catalogue import task_named
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.steps import run_evaluate

NAMES = ["O", "B-colour", "B-size", "I-size"]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_base(tmp_path_factory.mktemp(name), kind, settings, head)
        for name, (kind, settings, head) in ENCODERS.items()
    }


def test_from_words_to_a_served_adapter(encoders: dict[str, Path], own_store: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", tagged_rows(60))
    config = small_study(encoders["bert"], data, tracking_uri=own_store, max_steps=60, lr="2e-2")
    assert task_named(config).name == "token_classification"
    proven = run_and_prove(config)
    (record,) = proven.records
    assert record.metrics["test/f1"] > 0.9  # a tag follows from the word alone
    assert {"test/precision", "test/recall", "test/accuracy"} <= record.metrics.keys()
    assert record.metrics["head_parameters"] == 4 * 33
    assert "nats per word" in proven.shown
    assert " [[O]] " in proven.shown
    served = mlflow.pyfunc.load_model(proven.champion)
    rows = tagged_rows(10)
    tagged = served.predict([{"text": "  ".join(row["tokens"])} for row in rows])
    right = [
        tag == own
        for text, row in zip(tagged, rows, strict=True)
        for tag, own in zip(text.split(), row["ner_tags"], strict=True)
    ]
    assert sum(right) > 0.9 * len(right) == 45
    with pytest.raises(Exception, match=r"row 0: its text is .* tokens too long; cut it into sentences"):
        served.predict([{"text": "red " * 200}])
    part = [{"tokens": row["tokens"][:3], "ner_tags": row["ner_tags"][:3]} for row in rows]  # classes 0 and 1 of four
    elsewhere = small_study(encoders["bert"], write_rows(tmp_path / "part.json", part), tracking_uri=own_store)
    with pytest.raises(DataError, match="required the classes of the adapter, B-colour, B-size, I-size, O; got B-co"):
        run_evaluate(elsewhere, proven.champion, 0, Console(quiet=True))


@pytest.mark.parametrize("name", ENCODERS)
def test_tags_stand_at_the_first_token_of_each_word(encoders: dict[str, Path], name: str, tmp_path: Path) -> None:
    """One byte is one token here, and the model's own loss is the same mean over words."""
    data = write_rows(tmp_path / "rows.json", tagged_rows(40))
    context = StudyContext(small_study(encoders[name], data))
    test = context.splits(0).test
    for example in test:
        text = context.task.decoded(example.input_ids)
        words = [text[place:].split(" ")[0] for place in example.inputs["word_places"]]
        assert words == text.split(" ")
        assert example.supervised_tokens == len(words) == 5
    model, result = context.base.model, context.losses(context.base.model, test)
    for example, nll in zip(test, result.nll_E, strict=True):
        batch = context.task.collate([example])
        assert nll == pytest.approx(float(model(**batch.inputs, labels=batch.labels).loss) * 5, rel=1e-4)


def test_entities_are_counted_as_seqeval_counts_them(encoders: dict[str, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", tagged_rows(60))
    context = StudyContext(small_study(encoders["bert"], data, lr="1e-1"))
    test, model, task = context.splits(0).test, context.base.model, context.task
    with context.task.running(model):
        logits = [model(**task.collate([each]).inputs).logits[0, list(each.inputs["word_places"])] for each in test]
    labels = task.base.task["labels"]
    predicted = [[labels[tag] for tag in each.argmax(dim=-1).tolist()] for each in logits]
    wanted = [[labels[tag] for tag in each.inputs["tags"]] for each in test]
    overall = context.losses(model, test).overall
    assert any(tag != "O" for tags in predicted for tag in tags)
    assert overall["f1"] == pytest.approx(f1_score(wanted, predicted))
    assert overall["precision"] == pytest.approx(precision_score(wanted, predicted))
    assert overall["recall"] == pytest.approx(recall_score(wanted, predicted))


def test_parts_of_speech_have_no_entities(encoders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"words": row["tokens"], "pos": ["NUM", "ADJ", "ADJ", "ADJ", "NOUN"]} for row in tagged_rows(40)]
    data = write_rows(tmp_path / "rows.json", rows)
    context = StudyContext(small_study(encoders["bert"], data, response_column="pos"))
    assert context.task.name == "token_classification"
    assert context.losses(context.base.model, context.splits(0).test).overall.keys() == {"accuracy"}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_names_of_tags_that_a_data_set_declares(encoders: dict[str, Path], form: str, tmp_path: Path) -> None:
    """In Parquet files and on the cards of JSON files, numbers are names in the declared order."""
    import datasets

    rows: list[dict[str, Any]] = [
        {"tokens": row["tokens"], "ner_tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in tagged_rows(40)
    ]
    if form == "parquet":
        data = tmp_path / "rows.parquet"
        features = datasets.Features(
            {
                "tokens": datasets.List(datasets.Value("string")),
                "ner_tags": datasets.List(datasets.ClassLabel(names=NAMES)),
            }
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(data)
    else:
        data = tmp_path / "set"
        data.mkdir()
        (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        names = "\n".join(f"              '{at}': {name}" for at, name in enumerate(NAMES))
        card = (
            "---\ndataset_info:\n  features:\n  - name: tokens\n    list: string\n  - name: ner_tags\n    list:\n"
            f"      class_label:\n          names:\n{names}\n  splits:\n  - name: train\n---\n"
        )
        (data / "README.md").write_text(card, encoding="utf-8")
    context = StudyContext(small_study(encoders["bert"], data))
    assert list(context.task.base.task["labels"]) == NAMES
    assert context.data.every[0].response == "O B-colour O B-size I-size"


def test_rows_that_cannot_be_used_are_named(encoders: dict[str, Path], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*tagged_rows(30)]
    rows[0] = {"tokens": ["a", "b"], "ner_tags": ["O"]}
    rows[1] = {"tokens": "a b", "ner_tags": ["O", "O"]}
    rows[2] = {"tokens": ["a", ""], "ner_tags": ["O", "O"]}
    rows[3] = {"tokens": ["a", "b"], "ner_tags": ["O", None]}
    rows[4] = {"tokens": [], "ner_tags": []}
    data = write_rows(tmp_path / "rows.json", rows)
    with pytest.raises(DataError) as refused:
        StudyContext(small_study(encoders["bert"], data))
    said = str(refused.value)
    assert "item 0 (line 1): 2 words in 'tokens' and 1 tags in 'ner_tags'; required one tag a word." in said
    assert "item 1 (line 1): column 'tokens' must be a list with one value a word; got str." in said
    assert "item 2 (line 1): column 'tokens' must be a list of texts, none of which is empty or has a blank." in said
    assert "item 3 (line 1): column 'ner_tags' must hold tags of B-colour, B-size, I-size, O; got None." in said
    assert "item 4 (line 1): column 'tokens' must be a list with one value a word; got an empty list." in said
    block = "\n".join(StudyContext(small_study(encoders["bert"], data, on_bad_row="skip")).data_summary.lines())
    assert "1 row: not one tag in 'ner_tags' for each word in 'tokens' (first: rows.json item 0 (line 1))" in block
    test = write_rows(tmp_path / "test.json", [{"tokens": ["a"], "ner_tags": ["B-shape"]}])
    good = write_rows(tmp_path / "good.json", tagged_rows(30))
    with pytest.raises(
        DataError, match=r"test\.json item 0 \(line 1\): column 'ner_tags' must hold tags of .*'B-shape'"
    ):
        StudyContext(small_study(encoders["bert"], good, test_data=str(test)))


@pytest.mark.parametrize(
    ("column", "rows"),
    [
        ("ner_tags", [{"tokens": ["a", "b"], "ner_tags": [0, 3]}, {"tokens": ["c"], "ner_tags": ["B-size"]}]),
        ("label", [{"text": "a", "label": 3}, {"text": "b", "label": "large"}]),
    ],
)
def test_numbers_beside_names_are_refused(column: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """They would be further classes, where they are meant as the indices of the named ones."""
    data = DataConfig(data=str(write_rows(tmp_path / "rows.json", rows)))
    table = read_table(data)
    read = tag_names if column == "ner_tags" else class_names
    said = (
        rf"'{column}' has numbers and names as classes, such as [03] \(rows.json item 0 .* and '.*' \(rows.json item 1"
    )
    with pytest.raises(DataError, match=said):
        read(table, column)
    for row in rows:
        row[column] = [str(tag) for tag in row[column]] if isinstance(row[column], list) else str(row[column])
    write_rows(tmp_path / "rows.json", rows)
    assert read(read_table(data), column)[0] in ("0", "3")  # in texts, names may be numerals


def test_classes_that_no_training_example_has_are_named(encoders: dict[str, Path], tmp_path: Path) -> None:
    """One text has a tag that no other has; the remark stands where that text is not in the training split."""
    rare = {"tokens": ["old", "oak"], "ner_tags": ["O", "B-tree"]}
    data = write_rows(tmp_path / "rows.json", [*tagged_rows(9), rare])
    shown = {"test": ["0 in validation, 1 in test"], "train": [], "validation": ["1 in validation, 0 in test"]}
    for seed, place in ((0, "test"), (1, "train"), (5, "validation")):
        context = StudyContext(
            small_study(encoders["bert"], data, split_seed=seed, validation_share=0.3, test_share=0.3)
        )
        rank = context.data.labels.index("B-tree")
        assert any(rank in each.inputs["tags"] for each in getattr(context.splits(0), place))
        said = [line for line in context.data_summary.lines() if "classes that no training example has" in line]
        assert [line.partition(": ")[2] for line in said] == [f"'B-tree' ({counts})" for counts in shown[place]]


def test_tags_of_words_that_are_cut_are_counted(encoders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"tokens": [str(n), "red"] * 8, "ner_tags": ["O", "B-colour"] * 8} for n in range(30)]
    context = StudyContext(small_study(encoders["bert"], write_rows(tmp_path / "rows.json", rows), max_tokens=20))
    example = context.splits(0).test[0]
    assert len(example.input_ids) == 20
    assert len(example.inputs["word_places"]) == len(example.inputs["tags"]) < 16
    assert any("30 of 30 examples at 20 tokens" in line for line in context.data_summary.lines())


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "gpt2", "GPT2Config", GPT2, "GPT2LMHeadModel")
    data = write_rows(tmp_path / "rows.json", tagged_rows(30))
    with pytest.raises(
        ModelError, match="does not see the words after the one that it tags; required for --task token"
    ):
        StudyContext(small_study(folder, data, task="token_classification"))
