"""Conversations, plain text and generated answers: what is learned, cut, served and scored."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adaptive_lora.config import DataConfig
from adaptive_lora.data import collate, load_examples, tokenize, unpadded
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.packed import pack
from adaptive_lora.errors import ConfigError, DataError
from adaptive_lora.models.tasks.scores import answer_matches, chrf, final_answer, text_scores
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import answer, load_adapter

BaseContext = Callable[..., StudyContext]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "blue?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "thanks"},
]


def write(folder: Path, rows: list[dict[str, object]]) -> str:
    path = folder / "talks.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def chat_base(base_folder: Path, tmp_path: Path) -> Path:
    """The small GPT-2 with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(base_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(chat_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_base)


def talks(count: int) -> list[dict[str, object]]:
    """Return conversations of two answers each."""
    return [
        {"messages": [{**each, "content": f"{each['content']} {number}"} for each in TALK]} for number in range(count)
    ]


# --- conversations


def test_the_assistants_turns_are_learned_and_nothing_else(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = load_examples(DataConfig(data=write(tmp_path, [{"messages": TALK}])))
    (example,) = tokenize(data.examples, tokenizer, max_tokens=200, loss_on="response")
    shown = tokenizer.apply_chat_template(TALK[:5], tokenize=False)
    assert tokenizer.decode(example.input_ids) == shown  # the thanks have no answer
    batch = collate([example], pad_id=0)
    learned = tokenizer.decode(batch.labels[batch.labels != IGNORED])
    assert learned == "no<|endoftext|>yes<|endoftext|>"
    assert example.supervised_tokens == batch.supervised_tokens == 7
    prompt = tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == prompt
    assert example.response == "yes"
    assert torch.equal(pack([example]).targets, unpadded(batch).targets)
    (whole,) = tokenize(data.examples, tokenizer, max_tokens=200, loss_on="all")
    assert whole.supervised_tokens == len(whole.input_ids) - 1


def test_long_conversations_are_cut(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = load_examples(DataConfig(data=write(tmp_path, [{"messages": TALK}])))
    (whole,) = tokenize(data.examples, tokenizer, max_tokens=200, loss_on="response")
    inside = whole.prompt_length - 2  # the cut stands in the last question
    (cut,) = tokenize(data.examples, tokenizer, max_tokens=inside, loss_on="response")
    assert tokenizer.decode(cut.input_ids[cut.first_label :]) == "no<|endoftext|>"
    with pytest.raises(DataError, match="its first answer comes after max_tokens=20"):
        tokenize(data.examples, tokenizer, max_tokens=20, loss_on="response")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "required a list of {role, content} texts; got"),
        ([{"role": "user", "content": 3}], "required a list of"),
        ([{"role": "user", "content": "hello"}], "an answer of the role 'assistant'; found none"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path: Path, messages: object, message: str) -> None:
    rows = [{"messages": messages}]
    with pytest.raises(DataError, match=r"talks.json item 0 \(line 1\): .*" + message):
        load_examples(DataConfig(data=write(tmp_path, rows)))


def test_templates_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = load_examples(DataConfig(data=write(tmp_path, [{"messages": TALK}])))
    (example,) = data.examples

    def read() -> None:
        tokenize([example], tokenizer, max_tokens=200, loss_on="response")

    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not continue what it wrote"):
        read()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="tokenizer has no chat template"):
        read()
    tokenizer.chat_template = TEMPLATE
    example = dataclasses.replace(example, messages=(("tool", "x"), ("assistant", "y")))
    with pytest.raises(DataError, match="refuses the conversation: no tools"):
        read()
    for hostile in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append.__self__.clear() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}", "{{ 1 // 0 }}",
        "{{ range(10 ** 9) | list }}", "{{ messages[99].content.lower() }}", "{% raw %}",
        "{{ (lambda: 1)() }}", "{% include '/etc/passwd' %}", "{{ lipsum.__globals__ }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ):  # fmt: skip
        tokenizer.chat_template = hostile
        with pytest.raises(DataError, match=r"refuses the conversation|does not continue"):
            read()
    assert not Path("ran").exists()


def test_a_trial_on_conversations_is_served_by_the_template(
    make_bench: BaseContext, chat_base: Path, tmp_path: Path
) -> None:
    context = make_bench(
        model=str(chat_base), data=write(tmp_path, talks(30)), template="auto", max_tokens=128,
        methods="uniform:rank=2", seeds="0", generate="on", max_steps=4,
    )  # fmt: skip
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert outcome.test.loss < context.base_scores(0).loss
    assert outcome.test.exact_match is not None
    loaded = load_adapter(outcome.folder)
    (by_template,) = answer(loaded, [{"instruction": "red?"}], 8)
    (verbatim,) = answer(loaded, [{"prompt": "<user>red?<|endoftext|><assistant>"}], 8)
    assert by_template == verbatim
    again = context.losses(loaded[0], context.splits(0).test)
    assert (again.nll_E == outcome.test.nll_E).all()


# --- plain text


def test_plain_text_is_learned_whole_and_divided_by_text(make_bench: BaseContext, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"line {number} of text"} for number in range(30)]
    rows += [{"text": "LINE 0  of text"}]
    context = make_bench(
        data=write(tmp_path, rows), template="auto", methods="uniform:rank=2", seeds="0",
        max_steps=8, generate="auto",
    )  # fmt: skip
    parts = context.splits(0)
    assert len(parts.test) >= 4
    where = {
        part: [e for e in getattr(parts, part) if e.response.lower().startswith("line 0")]
        for part in ("train", "validation", "test")
    }
    assert sorted(map(len, where.values())) == [0, 0, 2]  # the same text stands in one part
    assert all(e.supervised_tokens == len(e.input_ids) - 1 for e in parts.train)
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert outcome.test.exact_match is None
    assert outcome.test.loss < context.base_scores(0).loss
    with pytest.raises(ConfigError, match="generate=on needs prompts"):
        make_bench(data=write(tmp_path, rows), template="auto", generate="on").base_scores(0)


# --- scores of generated text


@dataclasses.dataclass
class Reference:
    """What an example holds of its answer."""

    response: str


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 5. #### 5", "5"),
        ("#### 1 then #### $1,250.50.", "1250.50"),
        ("####-7", "-7"),
        ("####   70000 apples", "70000"),
        ("the answer is 5", None),
        ("#### none", None),
    ],
)
def test_final_answers(text: str, number: str | None) -> None:
    assert final_answer(text) == (None if number is None else Decimal(number))


def test_answers_are_compared_as_numbers() -> None:
    references = [Reference("#### 1,000"), Reference("#### 5"), Reference("#### 5")]
    right = answer_matches(["I think #### 1000.0", "#### 6", "5"], references)
    assert right is not None
    assert right.tolist() == [1.0, 0.0, 0.0]
    assert answer_matches(["#### 1"], [Reference("no mark")]) is None


def test_chrf_and_rouge_are_the_libraries() -> None:
    references = [Reference("the cat sat on the mat"), Reference("the cat sat on the mat")]
    texts = ["the cat sat on the mat", "a dog"]
    found = text_scores(texts, references)
    assert set(found) == {"rouge1", "rouge2", "rouge_l", "chrf"}
    assert found["chrf"][0] == found["rouge_l"][0] == 1.0
    assert 0 <= found["chrf"][1] < 0.2
    import sacrebleu

    assert chrf(["the cat sat"], references[:1])[0] == pytest.approx(
        sacrebleu.sentence_chrf("the cat sat", ["the cat sat on the mat"]).score / 100
    )


def test_gsm8k_is_scored_by_its_answers(make_bench: BaseContext, shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: len(row["question"]))
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(map(json.dumps, rows[:30])), encoding="utf-8")
    references = [Reference(row["answer"]) for row in rows]
    found = answer_matches([row["answer"] for row in rows], references)
    assert found is not None
    assert found.all()  # all 7,473 references have an answer, equal to itself
    context = make_bench(
        data=str(path), template="plain", max_tokens=128, methods="uniform:rank=2", seeds="0",
        generate="on", max_steps=2, eval_batch_size=8,
    )  # fmt: skip
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert {"answer", "chrf", "rouge_l"} <= set(outcome.test.further_E)
    metrics = context.task.metrics(outcome.test)
    assert metrics["answer"] == outcome.test.further_E["answer"].mean() == 0.0  # it knows nothing
    assert 0 <= metrics["rouge_l"] <= 1
    assert len(outcome.test.further_E["chrf"]) == len(outcome.test.example_ids)
