"""Rows that a served adapter answers, and rows that cannot be asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from task_bases import write_rows
from test_generation import CHATML, trained
from transformers import AutoTokenizer

from adaptive_lora.serving import answer
from adaptive_lora.serving.answers import asked_ids
from adaptive_lora.tracking.registry import save_served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Any:
    """An adapter on a base with a chat template, as MLflow loads it."""
    folder = tmp_path_factory.mktemp("served")
    base = shutil.copytree(base_folder, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(base)
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a"}]} for n in range(20)
    ]
    data = write_rows(folder / "talks.json", talks)
    adapter, _ = trained(folder, base, data, template="auto", generate="off")
    save_served(adapter, folder / "model", {})
    return mlflow.pyfunc.load_model(str(folder / "model"))


def ask(*contents: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant", "user")
    return [{"role": r, "content": c} for r, c in zip(roles[-len(contents) :], contents, strict=True)]


def test_a_conversation_is_asked_through_the_template(served: Any) -> None:
    rows = [
        {"messages": ask("red?")},
        {"messages": ask("Be brief.", "red?", "no", "blue?")},
        {"instruction": "red?"},
        {"prompt": "<system>Be brief.<|endoftext|><user>red?<|endoftext|><assistant>no"
                   "<|endoftext|><user>blue?<|endoftext|><assistant>"},
        {"messages": ask("red?"), "tools": [{"name": "look"}]},
        {"messages": ask("red?"), "tools": '[{"name": "look"}]'},
        {"prompt": '[{"name": "look"}]<user>red?<|endoftext|><assistant>'},
    ]  # fmt: skip
    found = served.predict(rows, params={"max_new_tokens": 6})
    alone = [served.predict([row], params={"max_new_tokens": 6}) for row in rows]
    assert [[text] for text in found] == alone
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[4] == found[5] == found[6]
    _, tokenizer, record = served.unwrap_python_model().loaded
    shown = tokenizer.apply_chat_template(rows[1]["messages"], add_generation_prompt=True)
    assert asked_ids(tokenizer, record, rows[1], "row 0") == shown["input_ids"]


def test_a_server_answers_conversations_too(served: Any) -> None:
    client = TestClient(scoring_server.init(served))
    rows = [{"messages": ask("Be brief.", "red?", "no", "blue?")}, {"prompt": "red"}]
    wanted = served.predict(rows, params={"max_new_tokens": 5})
    body = {"dataframe_records": rows, "params": {"max_new_tokens": 5}}
    reply = client.post("/invocations", json=body)
    assert (reply.status_code, reply.json()) == (200, {"predictions": wanted})
    reply = client.post("/invocations", json={"dataframe_records": [{"messages": ["red?"]}]})
    assert reply.status_code == 400
    assert "column 'messages': required a list of {role, content} texts" in reply.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "red?"}, "required rows with a column of prompt, instruction, input, messag"),
        ({"messages": []}, "row 0: column 'messages': required a list of {role, content} texts"),
        ({"messages": "red?"}, "row 0: column 'messages': required a list"),
        ({"messages": [{"role": "user"}]}, "required a list of"),
        ({"messages": [{"role": "user", "content": None}]}, "required a list of"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "'weight': 0"),
        ({"messages": [*ask("a"), {"role": "assistant", "content": "b"}]}, "ends before an answer"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "refuses the conversation: no tools"),
        ({"messages": ask("a"), "prompt": "b"}, "required one of the columns prompt, instruct"),
        ({"input": "a"}, "input only beside instruction"),
        ({"prompt": "a", "input": "b"}, "input only beside instruction"),
        ({"prompt": "a", "tools": "[]"}, "tools only beside messages"),
        ({"messages": ask("a"), "tools": "look"}, "column 'tools': required a list"),
        ({"messages": ask("x" * 200)}, r"row 0: its prompt takes 2\d\d tokens; .*for 12"),
        ({"prompt": ""}, "required one of the columns"),
        ({"instruction": ["a", "b"]}, "row 0: column 'instruction' must be text, got"),
        ({"instruction": "a", "input": ["b"]}, "row 0: column 'input' must be text, got"),
    ],
)
def test_a_row_that_cannot_be_asked_is_an_error(served: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        served.predict([row], params={"max_new_tokens": 2})
    if "question" not in row:
        with pytest.raises(ValueError, match=message.replace("row 0", "row 1")):
            served.predict([{"prompt": "a"}, row], params={"max_new_tokens": 2})


def test_tools_that_a_template_does_not_write_are_an_error(served: Any) -> None:
    _, tokenizer, record = served.unwrap_python_model().loaded
    row = {"messages": ask("a"), "tools": [{"name": "look"}]}
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = CHATML
        with pytest.raises(ValueError, match="row 3: the base's chat template does not write 'to"):
            asked_ids(tokenizer, record, row, "row 3")
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="row 3: the base's tokenizer has no chat template"):
            asked_ids(tokenizer, record, row, "row 3")
    finally:
        tokenizer.chat_template = template
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        served.predict([{"prompt": "a"}], params={"max_new_tokens": 0})


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "a", "second": "b"}, {"text": "a"}], "'second' in all rows, or in none"),
    ([{"text": ["a", "b"]}], "column 'text' must be text, got list"),
])  # fmt: skip
def test_pairs_and_single_texts_are_not_mixed(rows: list[dict[str, Any]], message: str) -> None:
    record = {"task": {"name": "regression", "max_tokens": 8}, "dtype": "float32"}
    model = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        answer((model, None, record), rows, 1)
