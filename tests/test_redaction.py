"""What must not be written is not, and text from outside cannot act on a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.errors import DataError
from adaptive_lora.redaction import hide_credentials, printable, shown

TOKEN = "hf_" + "q" * 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://u:p/w@h:5000", "http://***@h:5000"),
        ("https:/u:p@h/x", "https:/***@h/x"),
        ("https://tok@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("https://h/x?token=abc&y=1", "https://h/x?token=***&y=1"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=***"),
        (f"use {TOKEN}.", "use ***."),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("models:/name@champion", "models:/name@champion"),
        ("http://h:5000/x@y", "http://h:5000/x@y"),
        ("file:///a/b@c/d", "file:///a/b@c/d"),
        ("https://h/a, mail me@x.org", "https://h/a, mail me@x.org"),
    ],
)
def test_credentials_are_hidden(text: str, expected: str) -> None:
    assert hide_credentials(text, {}) == expected


def test_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"WANDB_API_KEY": "abcdefgh", "MY_PASSWORD": "on", "HOME_PAGE": "open sesame"}
    text = "abcdefgh on open sesame"
    assert hide_credentials(text, values) == "*** on open sesame"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    assert str(DataError("said correct horse")) == "said ***"


@given(st.text())
def test_nothing_acts_on_a_terminal(text: str) -> None:
    cleaned = printable(text)
    assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in cleaned)
    assert not set("\x7f\x9b\u202e\u2066") & set(cleaned)
    cleaned.encode()


def test_what_people_write_stays() -> None:
    text = "naïve 日本語 שלום 👩\u200d🚀 e\u0301"
    assert printable(text) == text
    assert printable("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"
    assert shown("[red]x[/]") == r"\[red]x\[/]"
