"""The embedded base and task data: what is promised of them holds for what is shipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from adaptive_lora import serving
from adaptive_lora.data.embedded_tasks import (
    LANGUAGES,
    LEXICONS,
    STUDY_FAMILIES,
    is_reserved,
    reserved_words,
    task_examples,
)
from adaptive_lora.data.templates import load_template
from adaptive_lora.errors import DataError
from benchmarks.embedded_base.__main__ import main as build_command
from benchmarks.embedded_base.build import RECORD, build_base, held_out_loss
from benchmarks.embedded_base.corpus import FAMILIES, WITH_INPUT, WITHOUT_INPUT, documents, render_prompt
from benchmarks.embedded_base.grammar import clause
from benchmarks.embedded_base.inflection import past, plural
from benchmarks.embedded_base.nonsense import pretraining_words

MEBIBYTE = 2**20


def base_folder() -> Path:
    return serving.base_folder("embedded", "embedded")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def corpus() -> str:
    return "\n".join(islice(documents("a sample"), 20_000))


@pytest.fixture(scope="module")
def corpus_words(corpus: str) -> set[str]:
    return {word.strip(".,:?!->=()\"'") for word in corpus.split()}


def test_pretraining_never_saw_the_study(corpus: str, corpus_words: set[str]) -> None:
    invented = {word for lexicon in LEXICONS.values() for word in lexicon.values()}
    assert not invented & corpus_words
    assert not set(reserved_words()) & corpus_words
    for language in LEXICONS:
        assert language.lower() not in {word.lower() for word in corpus_words}
    for family in STUDY_FAMILIES:
        for wording in family.wordings:
            assert wording.replace("{x}", "").strip(" :") not in corpus


def test_study_rests_on_english_that_pretraining_had(corpus_words: set[str]) -> None:
    english = {word for lexicon in LEXICONS.values() for word in lexicon}
    assert english <= corpus_words


def test_study_inflects_english_as_pretraining_does() -> None:
    for language in LANGUAGES:
        assert dict(language.nouns) == {noun: plural(noun) for noun in language.nouns}
        assert dict(language.verbs) == {verb: past(verb) for verb in language.verbs}


def test_invented_words_are_unambiguous() -> None:
    invented = [word for lexicon in LEXICONS.values() for word in lexicon.values()]
    assert len(invented) == len(set(invented))
    assert all(is_reserved(word) for word in invented)
    assert not any(is_reserved(word) for word in pretraining_words(Random(0), 200))


def test_corpus_is_varied(corpus: str, corpus_words: set[str]) -> None:
    assert len(FAMILIES) >= 20
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    real = {word.lower() for word in corpus_words if word.isalpha()}
    assert len(real) > 1500
    sample = list(islice(documents("another sample"), 5_000))
    assert len(set(sample)) > 0.85 * len(sample)


def test_corpus_is_seeded() -> None:
    first, again, other = (list(islice(documents(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", range(5))
def test_ways_to_say_a_clause_agree(seed: int) -> None:
    said = clause(Random(seed), with_object=True, relative=False)
    assert said.statement().endswith(".")
    assert said.question().endswith("?")
    assert " not " in said.negation()
    assert " by " in said.passive()
    assert said.target is not None
    for text in (said.statement(), said.negation(), said.question()):
        assert said.target.text() in text


def test_prompts_are_those_of_the_study() -> None:
    template = load_template("compact")
    assert dict(template) == {"with_input": WITH_INPUT, "without_input": WITHOUT_INPUT}


def test_task_examples_are_seeded_unique_and_balanced() -> None:
    rows, again, other = task_examples(900, 5), task_examples(900, 5), task_examples(900, 6)
    assert rows == again
    assert rows != other
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert len({(row["family"], row["output"]) for row in rows}) == len(rows)
    counts = Counter(row["family"] for row in rows)
    assert set(counts) == {family.name for family in STUDY_FAMILIES}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert rows[:100] == task_examples(100, 5)
    assert all(set(row) == {"instruction", "input", "output", "family"} for row in rows)


def test_every_invented_word_is_taught_often() -> None:
    rows = task_examples(900, 0)
    text = " ".join(f"{row['instruction']} {row['input']} {row['output']}" for row in rows)
    for lexicon in LEXICONS.values():
        for invented in lexicon.values():
            assert text.count(invented) >= 5, invented


def test_too_many_task_examples_are_refused() -> None:
    with pytest.raises(DataError, match="required max_examples of at most"):
        task_examples(200_000, 0)


def test_task_examples_need_no_deep_learning_library() -> None:
    code = (
        "import sys; from adaptive_lora.data.embedded_tasks import task_examples; task_examples(8, 0);"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_study_rows_are_short(tokenizer: Any) -> None:
    lengths = [len(tokenizer(render_prompt(row) + row["output"])["input_ids"]) + 1 for row in task_examples(900, 1)]
    assert max(lengths) <= 48
    assert sum(lengths) / len(lengths) <= 35


def test_tokenizer_keeps_text(tokenizer: Any, corpus: str) -> None:
    study = "\n".join(render_prompt(row) + row["output"] for row in task_examples(200, 2))
    for text in (corpus[:50_000], study, "Zoë’s 3\tnaïve\n\n cafés 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for heading in ("### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"):
        assert len(tokenizer(heading)["input_ids"]) == 1
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_shipped_base_is_a_small_gpt2() -> None:
    weights = base_folder() / "model.safetensors"
    assert weights.stat().st_size <= 16 * MEBIBYTE
    assert all(tensor.dtype == torch.float32 for tensor in load_file(weights).values())
    names = {name for name, _ in GPT2LMHeadModel.from_pretrained(base_folder()).named_modules()}
    for site in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert f"transformer.h.0.{site}" in names


def test_shipped_base_is_as_good_as_recorded(tokenizer: Any) -> None:
    record = json.loads((base_folder() / RECORD).read_text())
    model = GPT2LMHeadModel.from_pretrained(base_folder()).eval()
    loss = held_out_loss(model, tokenizer, "drawn afresh by the tests")
    assert loss == pytest.approx(record["held_out_loss"], rel=0.08)
    assert loss < 0.4 * record["curve"][0]["held_out_loss"]
    assert record["tokens"] == record["steps"] * record["batch_rows"] * record["row_tokens"]
    assert record["parameters"] == model.num_parameters()


def test_recorded_difficulty_separates_ranks() -> None:
    record = json.loads((base_folder() / "difficulty.json").read_text())
    scores = {row["rank"]: row for row in record["results"]}
    losses = [scores[rank]["test_loss"] for rank in (0, 1, 8, 16)]
    assert losses == sorted(losses, reverse=True)
    assert scores[0]["exact_match"] < 0.05
    assert scores[16]["exact_match"] > 0.6


def test_builder_refuses_a_folder_that_holds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["embedded_base", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        build_command()
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_build_is_deterministic_and_learns(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    folders = [tmp_path / "one", tmp_path / "two"]
    record = build_base(folders[0], seed=1, steps=8, on_step=lambda *event: seen.append(event))
    build_base(folders[1], seed=1, steps=8)
    assert [step for step, _ in seen] == list(range(1, 9))
    assert seen[-1][1] < seen[0][1] - 0.5
    assert record["curve"][-1]["held_out_loss"] < record["curve"][0]["held_out_loss"] - 0.5
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    loaded = AutoTokenizer.from_pretrained(folders[0])
    assert loaded("### Instruction:\n")["input_ids"]
