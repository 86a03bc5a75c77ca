"""The methods by name: those of `adaptive_lora.methods` and those of other installed packages."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from adaptive_lora.plugins import PluginTable, checked

_PACKAGE = "adaptive_lora.methods"
_SUPPORT = ("adapters", "base", "importance", "start")
"""Modules of the package that hold no method; most of them import torch."""


class _OwnMethods(Mapping[str, Any]):
    """Every class of the package's modules that has a `name`; imported when first asked for, as plug-ins are."""

    @cached_property
    def _found(self) -> dict[str, Any]:
        package = importlib.import_module(_PACKAGE)
        base = importlib.import_module(f"{_PACKAGE}.base").Method
        found: dict[str, Any] = {}
        kinds: list[object] = []
        for module in pkgutil.iter_modules(package.__path__):
            if module.name in _SUPPORT:
                continue
            kinds += vars(importlib.import_module(f"{_PACKAGE}.{module.name}")).values()
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, base) and "name" in vars(kind):
                found[vars(kind)["name"]] = kind
        return found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _problem(kind: Any) -> str | None:
    """Return why an object is not the options class of a method, or None."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return f"required a frozen dataclass of options, got {kind!r}"
    if not any(hasattr(kind, name) for name in ("demand", "solve", "design")):
        return f"{kind.__name__} has no demand, solve or design"
    missing = [name for name in ("metric", "rank_label") if not hasattr(kind(), name)]
    return f"{kind.__name__} has no {', '.join(missing)}" if missing else None


def _adopted(kind: Any) -> Any:
    return importlib.import_module(f"{_PACKAGE}.base").adopted(kind)


METHODS: PluginTable[Any] = PluginTable(_OwnMethods(), "adaptive_lora.methods", checked(_problem, _adopted))
"""Name on the command line and in study files -> options class of the method."""
