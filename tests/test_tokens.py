"""Token ids: those that the base's own tokenizer gives for the whole text, wherever texts go."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import rows
from hypothesis import example as given_example
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers_made import CORPUS, MADE, byte_level, takes_white_space
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Example, TokenizedExample, load_examples, load_template, tokenize
from adaptive_lora.data.conversations import CHAT
from adaptive_lora.errors import DataError, ModelError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import answer, load_adapter
from adaptive_lora.serving import greedy as serving_greedy
from adaptive_lora.serving.answers import asked_ids
from adaptive_lora.serving.images import answer_ids, inputs_of
from adaptive_lora.serving.tokens import position_limit, prompt_ids

BaseContext = Callable[..., StudyContext]
FUZZED = int(os.environ.get("FUZZED", "40"))
"""Texts, or conversations, that are made up per kind of tokenizer."""
TEMPLATES = ("alpaca", "compact", "plain")


@cache
def made(kind: str) -> PreTrainedTokenizerBase:
    return MADE[kind]()


def one(tokenizer: Any, prompt: str, response: str) -> TokenizedExample:
    item = Example(id="0", prompt=prompt, response=response, where="row 0")
    (found,) = tokenize([item], tokenizer, max_tokens=10**6, loss_on="response")
    return found


def talk(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> TokenizedExample:
    item = Example(id="0", prompt="", response=messages[-1][1], where="row 0", messages=tuple(messages))
    (found,) = tokenize([item], tokenizer, max_tokens=10**6, loss_on="response")
    return found


def learned(found: TokenizedExample) -> list[int]:
    """Return the indices of the tokens whose loss counts."""
    between = {index for start, end in found.gaps for index in range(start, end)}
    return [index for index in range(found.first_label, found.length) if index not in between]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return what tokens spell, without white space, which decoders put in and leave out."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids)[:1])
    spelt = "".join(str(tokenizer.decode(list(ids))).split())
    inside = tokenizer is made("WordPiece") and pieces and pieces[0].startswith("##")
    return spelt[2:] if inside else spelt


def squeezed(tokenizer: Any, text: str) -> str:
    kept = "".join(text.split())
    return kept.lower() if tokenizer is made("WordPiece") else kept


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\n", "\n\n", "\t", ": ", "river", "the", " is", "42", "</x>"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=8,
).map("".join)
WRITTEN = TEXTS.filter(lambda text: bool(text.strip()))


# --- prompts and responses


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=FUZZED)
@given(prompt=TEXTS, response=WRITTEN)
@given_example(prompt="### Response:\n", response="the river 0")
@given_example(prompt="a: ", response="river")
@given_example(prompt="ri", response="ver")
@given_example(prompt="x\n\n", response="\n\ny")
def test_ids_are_those_of_the_whole_text(kind: str, prompt: str, response: str) -> None:
    tokenizer = made(kind)
    found = one(tokenizer, prompt, response)
    own = list(tokenizer(prompt + response)["input_ids"])
    end = tokenizer.eos_token_id
    assert list(found.input_ids) == (own if own[-1] == end else [*own, end])
    assert found.input_ids.count(end) == 1
    # The first token of all is not learned, where no token stands before an answer.
    first = min(found.prompt_length, found.first_label)
    supervised = text_of(tokenizer, found.input_ids[first:-1])
    assert supervised.endswith(squeezed(tokenizer, response))
    assert squeezed(tokenizer, prompt + response).endswith(supervised)
    (served,) = prompt_ids(tokenizer, [prompt])
    assert end not in served[1:]
    if served == list(found.input_ids[: len(served)]):  # no token spans the boundary
        assert supervised == squeezed(tokenizer, response)
        assert found.prompt_length in (len(served), found.first_label)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_served_prompt_is_what_stands_before_the_answer(kind: str, template: str) -> None:
    tokenizer, form = made(kind), load_template(template)["without_input"]
    prompts = [form.replace("{prompt}", f"Name the river of {number}.") for number in range(5)]
    served = prompt_ids(tokenizer, prompts)
    for prompt, ids in zip(prompts, served, strict=True):
        found = one(tokenizer, prompt, "the river")
        assert ids == list(found.input_ids[: found.prompt_length])


def apart(tokenizer: Any, item: Example) -> list[int]:
    """Return the ids that versions up to 0.2 made: prompt and response one by one."""
    prompt = tokenizer(item.prompt)["input_ids"]
    response = tokenizer(item.response, add_special_tokens=False)["input_ids"]
    return [*prompt, *response, tokenizer.eos_token_id]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_byte_level_tokenizers_are_as_they_were(template: str) -> None:
    forms = load_template(template)
    items = [
        Example(
            id=str(index),
            prompt=forms["with_input"].replace("{prompt}", row["instruction"]).replace(
                "{input}", row["input"]
            ),
            response=row["output"],
            where="",
        )
        for index, row in enumerate(rows(30))
    ]  # fmt: skip
    tokenizers = [made("byte level"), made("byte level with a beginning")]
    for tokenizer in tokenizers:
        found = tokenize(items, tokenizer, max_tokens=999, loss_on="response")
        assert [list(each.input_ids) for each in found] == [apart(tokenizer, i) for i in items]


@pytest.mark.parametrize("data", ["alpaca_en_demo.json", "gsm8k_train.jsonl"])
def test_real_data_has_the_ids_that_it_had(shared_data: Path, shared_models: Path, data: str) -> None:
    """GPT-2's own tokenizer: studies that were stored keep their numbers."""
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "gpt2-tokenizer")
    tokenizer.model_max_length = 10**9
    config = DataConfig(data=str(shared_data / data), max_examples=500)
    items = load_examples(config).examples
    found = tokenize(items, tokenizer, max_tokens=10**6, loss_on="response")
    assert [list(each.input_ids) for each in found] == [apart(tokenizer, item) for item in items]


def test_an_end_in_the_data_is_not_doubled() -> None:
    tokenizer = byte_level()
    found = one(tokenizer, "a\n", "yes<|im_end|>")
    assert tokenizer.decode(found.input_ids) == "a\nyes<|im_end|>"


def test_white_space_that_a_sign_takes_in_does_not_make_it_learned() -> None:
    tokenizer = takes_white_space()
    found = talk(tokenizer, [("user", "a"), ("assistant", "  yes")])
    assert text_of(tokenizer, found.input_ids[found.first_label :]) == "yes<|end|>"


def test_a_prompt_that_runs_into_the_answer_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = made("SentencePiece")
    with caplog.at_level(logging.WARNING):
        one(tokenizer, "### Response:\n", "the river")
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        one(tokenizer, "the answer: it ", "is river")
    assert ["1 of the first 1 examples" in line for line in caplog.messages] == [True]


def test_transformers_does_not_warn_of_long_texts(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level(model_max_length=10)
    logging.getLogger("transformers").propagate = True
    try:
        one(tokenizer, CORPUS[0], CORPUS[1])
        prompt_ids(tokenizer, [CORPUS[0]])
        talk(tokenizer, [("user", CORPUS[0]), ("assistant", "yes")])
    finally:
        logging.getLogger("transformers").propagate = False
    assert not [line for line in caplog.messages if "longer than" in line]


# --- conversations


TALKS = st.lists(st.tuples(WRITTEN, WRITTEN), min_size=1, max_size=3).map(
    lambda pairs: [message for asked, answered in pairs for message in (("user", asked), ("assistant", answered))]
)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=FUZZED)
@given(messages=TALKS)
@given_example(messages=[("user", "river"), ("assistant", "it is"), ("user", "more"), ("assistant", "no")])
def test_conversations_have_the_ids_of_their_template(kind: str, messages: list[tuple[str, str]]) -> None:
    tokenizer = made(kind)
    listed = [{"role": role, "content": content} for role, content in messages]
    found = talk(tokenizer, messages)
    own = tokenizer.apply_chat_template(listed, tokenize=True)["input_ids"]
    assert list(found.input_ids) == list(own)[: found.length]
    assert not text_of(tokenizer, list(own)[found.length :])
    whole = text_of(tokenizer, [found.input_ids[index] for index in learned(found)])
    at = 0
    for role, content in messages:  # every answer, in order, and nothing that others say
        if role == "assistant":
            at = whole.index(squeezed(tokenizer, content), at) + len(squeezed(tokenizer, content))
    signs = len(whole) - sum(len(squeezed(tokenizer, content)) for role, content in messages if role == "assistant")
    assert 0 <= signs <= len("<|im_end|>") * len(messages)


@pytest.mark.parametrize("kind", MADE)
def test_a_question_is_asked_as_in_training(kind: str) -> None:
    tokenizer = made(kind)
    forms = {"template": dict(CHAT)}
    served = asked_ids(tokenizer, forms, {"instruction": "Name the river"}, "row 0")
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the river"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    found = talk(tokenizer, [("user", "Name the river"), ("assistant", "it is")])
    assert served == list(own) == list(found.input_ids[: found.prompt_length])


REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_templates_of_reasoning_models_are_refused_by_their_cause() -> None:
    tokenizer = byte_level(template=REASONING)
    with pytest.raises(
        DataError,
        match=r"ends the prompt for an answer in '<think>\\n', but writes an answer as "
        r"'yes<\|im_end\|>\\n' \(row 0, message 1\).*take that text out of the prompt",
    ):
        talk(tokenizer, [("user", "a"), ("assistant", "yes")])
    tokenizer.chat_template = REASONING.replace("<think>\n{% endif", "{% endif")
    with pytest.raises(DataError, match="does not write the answer as it is given: '<think>so"):
        talk(tokenizer, [("user", "a"), ("assistant", "<think>so</think>yes")])
    assert talk(tokenizer, [("user", "a"), ("assistant", "yes")]).supervised_tokens > 1


# --- questions about pictures


@pytest.mark.parametrize("kind", ["byte level with an end", "SentencePiece, always a blank"])
def test_an_answer_about_a_picture_follows_on_its_question(kind: str) -> None:
    tokenizer = MADE[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    processor: Any = transformers.LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    picture = Image.new("RGB", (32, 32))
    asked = inputs_of(processor, ("Which river?", picture))["input_ids"][0].tolist()
    answered = answer_ids(processor, "Which river?", "the river 0")
    text = f"{processor.image_token}\nWhich river?\nthe river 0"
    own = processor(text=[text], images=[picture], return_tensors="pt")["input_ids"][0].tolist()
    assert [*asked, *answered] == [token for token in own if token != tokenizer.eos_token_id]
    assert asked.count(tokenizer.convert_tokens_to_ids("<image>")) == 4  # 2 x 2 patches


# --- bases


SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def save_base(folder: Path, tokenizer: Any, kind: str = "LlamaConfig", **changed: Any) -> Path:
    """Write a base with random weights and as many rows as the tokenizer has tokens, or others."""
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    settings = {**SIZE, **ends, "vocab_size": len(tokenizer), **changed}
    config = getattr(transformers, kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["byte level with an end", "SentencePiece, always a blank", "WordPiece"])
def test_served_and_scored_prompts_have_the_ids_of_training(
    kind: str, make_bench: BaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", made(kind), pad_token_id=0)
    context = make_bench(model=str(base), methods="uniform:rank=2", seeds="0", max_steps=2, generate="on")
    seen: list[list[int]] = []
    wanted = [list(e.input_ids[: e.prompt_length]) for e in context.splits(0).test]
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    loaded = load_adapter(outcome.folder)

    def watched(*_: Any, **given: Any) -> list[str]:
        inputs = given.get("inputs") or _[2]
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        seen.extend(ids[mask].tolist() for ids, mask in pairs)
        return [""] * len(inputs["input_ids"])

    monkeypatch.setattr(serving_greedy, "greedy", watched)
    asked = {
        e.prompt: {"instruction": row["instruction"], "input": row["input"]}
        for row, e in zip(rows(40), load_examples(context.config.data).examples, strict=True)
    }
    ids = {e.id: e.prompt for e in load_examples(context.config.data).examples}
    for example in context.splits(0).test:
        answer(loaded, [asked[ids[example.id]]], 2)
    assert seen == wanted
    assert all(made(kind).eos_token_id not in row[1:] for row in seen)


def test_ids_without_a_row_are_refused_by_name(make_bench: BaseContext, tmp_path: Path) -> None:
    tokenizer = byte_level(model_max_length=500)
    known = len(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    base = save_base(tmp_path / "base", tokenizer, vocab_size=known)
    context = make_bench(model=str(base), methods="uniform:rank=2", seeds="0", max_steps=1)
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")  # none is used
    message = (
        f"ids up to {known + 1}, and the embeddings have {known} rows .*no row for '<think>' "
        rf"\({known}\), '</think>' \({known + 1}\)"
    )
    with pytest.raises(ValueError, match=message):
        answer(load_adapter(outcome.folder), [{"instruction": "<think>a</think>"}], 2)
    data = tmp_path / "think.json"
    listed = [{"instruction": f"a {n}", "output": "<think>b</think> c"} for n in range(9)]
    data.write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        make_bench(model=str(base), data=str(data), methods="uniform:rank=2", seeds="0")


def test_a_pad_token_without_a_row_is_not_used(make_bench: BaseContext, tmp_path: Path) -> None:
    tokenizer = byte_level()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|added pad|>"})
    base = save_base(tmp_path / "base", tokenizer, vocab_size=known)
    context = make_bench(model=str(base), methods="uniform:rank=2", seeds="0", batching="padded")
    examples = context.splits(0).train[:5]
    assert int(context.task.collate(examples).input_ids.max()) < known
    alone = [context.losses(context.base.model, [e]).nll_E[0] for e in examples]
    assert context.losses(context.base.model, examples).nll_E == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "stated", "limit"),
    [
        ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, None),
        ("BloomConfig", {}, None),  # no such setting
        ("MambaConfig", {}, None),
        ("LlamaConfig", {"max_position_embeddings": -1}, None),
        ("LlamaConfig", {"max_position_embeddings": 77}, 77),
        ("GPT2Config", {"n_positions": 66}, 66),
        ("RobertaConfig", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ],
)
def test_limits_of_positions(kind: str, stated: dict[str, Any], limit: int | None) -> None:
    assert position_limit(getattr(transformers, kind)(**stated)) == limit


def test_without_a_limit_max_tokens_alone_cuts(make_bench: BaseContext, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "d_model": 32, "n_heads": 4, "n_layers": 2}
    base = save_base(tmp_path / "base", byte_level(model_max_length=-1), "MptConfig", **sizes)
    context = make_bench(model=str(base), methods="uniform:rank=2", seeds="0", max_steps=1, generate="on")
    assert context.base.max_positions is None
    assert max(e.length for e in context.splits(0).train) > 20
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert answer(load_adapter(outcome.folder), [{"instruction": "a"}], 3) != [""]


def test_models_that_read_both_ways_are_no_causal_ones(make_bench: BaseContext, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0}
    base = save_base(tmp_path / "base", byte_level(), "XLNetConfig", **sizes)
    with pytest.raises(ModelError, match=r"XLNetLMHeadModel\) is no causal language model: tokens"):
        make_bench(model=str(base), methods="uniform:rank=2", seeds="0")
