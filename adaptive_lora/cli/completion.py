"""Completion of values in shells: choices, methods with their options, names beside paths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from importlib.resources import files
from itertools import chain

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from adaptive_lora.allocation import METHODS, METRICS, MethodSpec
from adaptive_lora.config.planted import NAME as PLANTED

_BREAKS = ":="
"""Characters at which bash splits the words of a line."""


def completed(name: str, choices: Collection[str], metavar: str) -> Callable[..., list[CompletionItem]] | None:
    """Return what completes an option's value in a shell; None where no value is known.

    Args:
        name: name of the option.
        choices: its values where they are listed.
        metavar: its form in `--help`, by which paths and booleans are known.
    """
    kind = "dir" if metavar.startswith("DIRECTORY") else "file" if metavar.endswith(("PATH", "FILE")) else None
    known = ("true", "false") if metavar == "BOOLEAN" else choices

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if name in ("method", "methods", "of"):
            values: Iterable[str] = method_values(incomplete)
        else:
            values = (value for value in chain(known, _named(name)) if value.startswith(incomplete))
        paths = [] if kind is None else [CompletionItem(incomplete, type=kind)]  # first: bash drops what is before
        return [*paths, *map(CompletionItem, values)]

    return complete if known or kind or name in ("method", "methods", "of") else None


def method_values(incomplete: str) -> list[str]:
    """Return the values that complete the last of several methods, `NAME[:option=value,...]`."""
    before, space, last = incomplete.rpartition(" ")
    name, colon, rest = last.partition(":")
    if not colon:
        found = [one for one in METHODS if one.startswith(name)]
    elif name not in METHODS:
        found = []
    else:
        given, comma, part = rest.rpartition(",")
        taken = {item.partition("=")[0] for item in given.split(",")}
        found = [f"{name}:{given}{comma}{text}" for text in _options(name, part, taken)]
    return [f"{before}{space}{one}" for one in found]


def _options(method: str, part: str, taken: Collection[str]) -> list[str]:
    """Return what completes `option=value` of a method, without the options that are given already."""
    fields = {
        field.name: field
        for owner in (METHODS[method], MethodSpec)
        for field in dataclasses.fields(owner)
        if field.name not in ("options", METHODS[method].further)
    }
    option, equals, begun = part.partition("=")
    if not equals:
        return [f"{name}=" for name in fields if name.startswith(option) and name not in taken]
    known: dict[str, Iterable[str]] = {"metric": METRICS, "of": METHODS}
    if option in fields and option not in known:
        field = fields[option]
        known[option] = ("true", "false") if isinstance(field.default, bool) else field.metadata["limits"].choices
    return [f"{option}={value}" for value in known.get(option, ()) if value.startswith(begun)]


def _named(option: str) -> list[str]:
    """Return the names that an option takes beside paths."""
    if option == "template":
        text = (files("adaptive_lora") / "data" / "templates.yaml").read_text(encoding="utf-8")
        return ["auto", *re.findall(r"(?m)^(\w+):", text)]
    return {"model": ["embedded"], "data": ["embedded", f"{PLANTED}:"]}.get(option, [])


class _Bash(BashComplete):
    """Completion in bash of words that hold `:` and `=`, at which bash splits them."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is completed, and that word, each put together again."""
        split, begun = super().get_completion_args()
        words: list[str] = []
        glued = False
        for word in [*split, begun]:
            breaks = bool(word) and not word.strip(_BREAKS)
            if word == "=" and words and words[-1].startswith("--"):  # between an option and its value
                words.append("")
                breaks = True
            elif words and (glued or breaks):
                words[-1] += word
            else:
                words.append(word)
            glued = breaks
        self._kept = re.sub(rf"[^{_BREAKS}]*$", "", words[-1])
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return a completion without what stands before bash's own word."""
        return f"{item.type},{str(item.value).removeprefix(self._kept)}"


add_completion_class(_Bash)
