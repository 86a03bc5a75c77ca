"""Redaction of text that leaves this process: secrets are hidden, control characters escaped."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
"""Pattern of the names of environment variables whose values are never written."""
_SHORTEST = 6
"""Minimum length of a secret value in characters; shorter ones (`1`, `true`) are switches found in any text."""
_USERINFO = re.compile(
    r"\b([a-z][a-z0-9+.-]{0,20}://(?!/)|https?:/(?!/))"
    r"(?:[^\s/\"'<>?#]{0,300}|[^\s/@:\"'<>?#]{1,100}:(?!\d+/)[^\s\"'<>?#]{0,300})@",
    re.I,
)
"""User and password of a URI, of which the password may hold `/` and `@`. One slash is enough for
http: `Path` makes `https:/` of `https://`. All lengths are bounded: hostile text costs no more."""
_PARAMETER = re.compile(
    r"([?&;](?:[\w.-]{0,40}"
    r"(?:token|password|passwd|secret|signature|api[_-]?key|access[_-]?key)"
    r"[\w.-]{0,40}|sig|pwd|key)=)[^&;\s\"'<>#]+",
    re.I,
)
_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|dapi[0-9a-f]{32}(?:-\d+)?|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,})"
)
"""Tokens with a known prefix: Hugging Face, GitHub, GitLab, AWS, Databricks, OpenAI, Slack."""


def hide_credentials(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text with every recognisable secret replaced by `***`.

    Secrets are: user and password of URIs, secret parameters of their queries, tokens with known
    prefixes, and values of environment variables whose names mark them as secret.
    """
    return _hide(text, _secrets(os.environ if environment is None else environment))


def _secrets(environment: Mapping[str, str]) -> re.Pattern[str] | None:
    """Return the pattern of the secret values in an environment; None where it has none."""
    known = {
        value
        for name, value in environment.items()
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and not os.path.exists(value)
    }
    if not known:
        return None
    listed = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    # whole words only: a password `123456` also occurs inside numbers
    return re.compile(rf"(?<![A-Za-z0-9.])(?:{listed})(?![A-Za-z0-9])")


def _hide(text: str, secrets: re.Pattern[str] | None) -> str:
    if secrets is not None:
        text = secrets.sub(HIDDEN, text)
    text = _USERINFO.sub(rf"\g<1>{HIDDEN}@", text)
    return _SHAPE.sub(HIDDEN, _PARAMETER.sub(rf"\g<1>{HIDDEN}", text))


def hide_in(values: Any) -> Any:
    """Return JSON-ready values with credentials hidden in every text; keys and numbers are unchanged."""
    secrets = _secrets(os.environ)  # once, not for every text

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return _hide(value, secrets)
        if isinstance(value, Mapping):
            return {key: hidden(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [hidden(one) for one in value]
        return value

    return hidden(values)


def printable(text: str) -> str:
    r"""Return a text with control, bidirectional and surrogate characters escaped, such as `\x1b`.

    Such characters in names or contents of files could move a terminal's cursor or disguise a name.
    """
    return "".join(sign if sign in "\n\t" or _harmless(sign) else _escape(sign) for sign in text)


def _harmless(sign: str) -> bool:
    return sign in "\u200c\u200d" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs")


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(text: object) -> str:
    """Return untrusted text for rich's console: secrets hidden, control characters and markup escaped."""
    from rich.markup import escape

    return escape(printable(hide_credentials(str(text))))
