"""What conversations hold beside roles and contents: honoured, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_rows import save
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Example, TokenizedExample, collate, load_examples, tokenize
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.rows import BadRow
from adaptive_lora.errors import DataError

END = "<|endoftext|>"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"limit": 1.5}}}]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}<|endoftext|>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
Message = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(folder: Path, row: dict[str, Any]) -> Example:
    (example,) = load_examples(DataConfig(data=save(folder, [row]))).examples
    return example


def tokens_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> TokenizedExample:
    (made,) = tokenize([example], tokenizer, max_tokens=4000, loss_on="response")
    return made


def learned(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    batch = collate([tokens_of(example, tokenizer)], pad_id=0)
    return str(tokenizer.decode(batch.labels[batch.labels != IGNORED]))


def said(role: str, content: str | None, **more: object) -> Message:
    return {"role": role, "content": content, **more}


# --- what is learned


@pytest.mark.parametrize(
    ("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("training", False, True), ("loss", False, True)]
)
def test_turns_that_are_not_to_be_learned_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, key: str, no: object, yes: object
) -> None:
    messages = [
        said("user", "one"), said("assistant", "WRONG", **{key: no}), said("user", "again"),
        said("assistant", "right", **{key: yes}), said("user", "more"), said("assistant", "also"),
        said("user", "end"), said("assistant", "last", **{key: no}),
    ]  # fmt: skip
    example = read(tmp_path, {"messages": messages})
    assert learned(example, tokenizer) == f"right{END}also{END}"
    assert example.response == "also"
    bare = [{"role": m["role"], "content": m["content"]} for m in messages[:6]]
    whole = tokenizer.apply_chat_template(bare, tokenize=False)
    assert tokenizer.decode(tokens_of(example, tokenizer).input_ids) == whole


@pytest.mark.parametrize("value", [0.5, 2, "0", "yes", [1]])
def test_other_weights_are_refused(tmp_path: Path, value: object) -> None:
    messages = [said("user", "a"), said("assistant", "b", weight=value)]
    with pytest.raises(DataError, match="'weight' of a message must be 0 or 1, false or true; got"):
        read(tmp_path, {"messages": messages})


def test_only_the_assistant_is_learned(tmp_path: Path) -> None:
    messages = [said("user", "a", weight=1), said("assistant", "b")]
    with pytest.raises(DataError, match="'weight' asks to learn a message of the role 'user'"):
        read(tmp_path, {"messages": messages})
    assert read(tmp_path, {"messages": [said("user", "a", weight=0), messages[1]]}).response == "b"


def test_a_greeting_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if not messages %}{{ raise_exception('empty conversation') }}{% endif %}" + TEMPLATE
    talk = [said("assistant", "Welcome!"), said("user", "a"), said("assistant", "b")]
    for before in ([], [said("system", "s")]):
        example = read(tmp_path, {"messages": [*before, *talk]})
        assert learned(example, tokenizer) == f"b{END}"
        whole = tokenizer.apply_chat_template([*before, *talk], tokenize=False)
        assert tokenizer.decode(tokens_of(example, tokenizer).input_ids) == whole
    only = read(tmp_path, {"messages": [said("system", "s"), said("assistant", "b")]})
    assert learned(only, tokenizer) == f"b{END}"
    tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(
    "messages",
    [
        [said("assistant", "Welcome!")],
        [said("assistant", "Welcome!"), said("user", "a")],
        [said("user", "a"), said("assistant", "b", weight=0)],
    ],
)
def test_conversations_without_an_answer_that_is_learned(tmp_path: Path, messages: list[Message]) -> None:
    with pytest.raises(DataError, match="required an answer that is learned"):
        read(tmp_path, {"messages": messages})


@pytest.mark.parametrize("role", ["gpt", "model", "Assistant", "bot"])
def test_an_answer_under_another_role_is_refused(tmp_path: Path, role: str) -> None:
    talk = [said("user", "a"), said(role, "b"), said("user", "c"), said("assistant", "d")]
    with pytest.raises(DataError, match=f"role '{role}' would be read, not learned"):
        read(tmp_path, {"messages": talk})


def test_an_empty_answer_between_others_is_refused(tmp_path: Path) -> None:
    """It would teach the model to end at once."""
    talk = [said("user", "a"), said("assistant", " "), said("user", "c"), said("assistant", "d")]
    with pytest.raises(DataError, match="message 1: an answer of the role 'assistant' is empty"):
        read(tmp_path, {"messages": talk})
    talk[1] = said("assistant", "", weight=0)
    assert read(tmp_path, {"messages": talk}).response == "d"


def test_keys_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    talk = [said("user", "a"), said("assistant", "b", weight=1, train=False)]
    with pytest.raises(DataError, match="weight and train of a message say different things"):
        read(tmp_path, {"messages": talk})
    both = [{**said("user", "a"), "from": "human", "value": "z"}, said("assistant", "b")]
    with pytest.raises(DataError, match=r"required a list of .role, content"):
        read(tmp_path, {"messages": both})


def test_a_nul_sign_in_a_message_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds a NUL sign"):
        read(tmp_path, {"messages": [said("user", "a\0"), said("assistant", "b")]})


def test_what_is_not_used_of_conversations_is_counted(tmp_path: Path) -> None:
    talk = [said("user", "a"), said("critic", "x"), said("assistant", "b"), said("user", "bye")]
    data = save(tmp_path, [{"messages": talk}, {"messages": talk[:3]}])
    (reading,) = load_examples(DataConfig(data=data)).readings
    assert reading.notes == (
        "1 messages after the last answer that is learned are not used",
        "other roles, read as the chat template writes them: critic (2)",
    )


# --- tools and calls


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_go_to_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tools: object) -> None:
    messages = [said("user", "a"), said("assistant", "b")]
    example = read(tmp_path, {"messages": messages, "tools": tools})
    shown = tokenizer.decode(tokens_of(example, tokenizer).input_ids)
    assert shown == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert "weather" in shown
    assert learned(example, tokenizer) == f"b{END}"
    bare = read(tmp_path, {"messages": messages, "tools": []})
    assert "weather" not in tokenizer.decode(tokens_of(bare, tokenizer).input_ids)
    assert bare.id != example.id


@pytest.mark.parametrize("tools", ["weather", {"name": "x"}, ["x"], 3])
def test_tools_of_another_form(tmp_path: Path, tools: object) -> None:
    row = {"messages": [said("user", "a"), said("assistant", "b")], "tools": tools}
    with pytest.raises(DataError, match="column 'tools' must be a list of objects"):
        read(tmp_path, row)


CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]


def test_calls_are_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        said("user", "a"), said("assistant", None, tool_calls=CALL),
        said("tool", "rain", tool_call_id="1"), said("assistant", "it rains"),
    ]  # fmt: skip
    example = read(tmp_path, {"messages": messages, "tools": TOOLS})
    assert learned(example, tokenizer) == f"<call>weather{END}it rains{END}"
    last = read(tmp_path, {"messages": messages[:2]})
    assert learned(last, tokenizer) == f"<call>weather{END}"
    reading = load_examples(DataConfig(data=save(tmp_path, [{"messages": messages}]))).readings[0]
    assert reading.notes == ("further keys of messages, given to the chat template: tool_call_id (1), tool_calls (1)",)


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"messages": [said("user", "a"), said("assistant", "b")], "tools": TOOLS}, "tools"),
        ({"messages": [said("user", "a"), said("assistant", "b", tool_calls=CALL)]}, "tool_calls"),
        ({"messages": [said("user", "a"), said("assistant", "b", reasoning_content="hm")]}, "reasoning_content"),
    ],
)
def test_a_template_that_does_not_write_them(
    tmp_path: Path, base_folder: Path, row: dict[str, Any], missing: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = read(tmp_path, row)
    with pytest.raises(BadRow, match=f"line 1: .* template does not write {missing}; required"):
        tokens_of(example, tokenizer)


def test_tools_as_text_are_json_as_files_are(tmp_path: Path) -> None:
    talk = [said("user", "a"), said("assistant", "b")]
    for tools in ('[{"name": "f", "name": "g"}]', '[{"limit": NaN}]'):
        with pytest.raises(DataError, match="column 'tools' must be a list of objects"):
            read(tmp_path, {"messages": talk, "tools": tools})


@pytest.mark.parametrize("key", ["function_call", "train_detail", "loss_mask", "loss_scale", "masked", "images"])
def test_keys_that_are_not_read_are_refused(tmp_path: Path, key: str) -> None:
    messages = [said("user", "a"), said("assistant", "b", **{key: {"a": 1}})]
    with pytest.raises(DataError, match=f"the key '{key}' of a message is not read"):
        read(tmp_path, {"messages": messages})


# --- ShareGPT's form and columns beside


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_sharegpt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str) -> None:
    talk = [
        {"from": "system", "value": "s"}, {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "weight": 0}, {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d"},
    ]  # fmt: skip
    example = read(tmp_path, {column: talk})
    assert [role for role, _ in example.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert learned(example, tokenizer) == f"d{END}"
    with pytest.raises(DataError, match="'from' must be one of human, user, gpt"):
        read(tmp_path, {column: [{"from": "function_call", "value": "{}"}, *talk]})


def test_a_system_column_is_the_first_message(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    example = read(tmp_path, {"conversations": talk, "system": "Be brief."})
    assert example.messages[0] == ("system", "Be brief.")
    whole = tokenizer.decode(tokens_of(example, tokenizer).input_ids)
    assert whole.startswith("<system>Be brief.<|endoftext|><user>a")
    assert read(tmp_path, {"conversations": talk, "system": ""}).messages[0] == ("user", "a")
    twice = [{"from": "system", "value": "x"}, *talk]
    with pytest.raises(DataError, match="has a column 'system' and a message of that role"):
        read(tmp_path, {"conversations": twice, "system": "Be brief."})


def test_what_is_learned_decides_the_digest(tmp_path: Path) -> None:
    messages = [
        said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d"),
    ]  # fmt: skip
    changed = [*messages[:1], said("assistant", "b", weight=0), *messages[2:]]
    digests = {
        load_examples(DataConfig(data=save(tmp_path, [row]))).digest
        for row in (
            {"messages": messages}, {"messages": changed}, {"messages": messages, "tools": TOOLS},
        )
    }  # fmt: skip
    assert len(digests) == 3


# --- any conversation

WORDS = st.text(st.sampled_from("abcde é<>日\n \"'{}%"), min_size=1, max_size=12).filter(str.strip)
ROLES = st.sampled_from(["user", "assistant", "assistant", "tool", "system"])
TURNS = st.lists(st.tuples(ROLES, WORDS, st.sampled_from([None, 0, 1])), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(TURNS, st.booleans())
def test_the_supervised_text_is_the_answers_that_were_given(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str, int | None]], sharegpt: bool
) -> None:
    names = ("from", "value") if sharegpt else ("role", "content")
    messages = [
        {names[0]: role, names[1]: text, **({"weight": weight} if weight is not None and role == "assistant" else {})}
        for role, text, weight in turns
    ]
    opening = next((i for i, (role, _, _) in enumerate(turns) if role not in ("assistant", "system")), 99)
    answers = [i for i, (role, _, _) in enumerate(turns) if role == "assistant"]
    wanted = [i for i in answers if turns[i][2] != 0 and i > opening]
    if not wanted and answers and answers[-1] > 0 and turns[answers[-1]][2] != 0:
        wanted = answers[-1:]
    try:
        example = read(tmp_path, {"messages": messages})
    except DataError:
        assert not wanted
        return
    assert learned(example, tokenizer) == "".join(f"{turns[i][1]}{END}" for i in wanted)
    bare = [{"role": role, "content": text} for role, text, _ in turns[: wanted[-1] + 1]]
    assert tokenizer.decode(tokens_of(example, tokenizer).input_ids) == (
        tokenizer.apply_chat_template(bare, tokenize=False)
    )
