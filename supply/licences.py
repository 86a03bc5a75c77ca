"""Write supply/LICENCES.md: the licence of every pinned package, from its own metadata.

python supply/licences.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTED = ROOT / "supply" / "LICENCES.md"
COPYLEFT = re.compile(r"\b[AL]?GPL|GNU|MPL|Mozilla|EUPL|CDDL|EPL", re.I)
_ELSEWHERE = {"atheris": "Apache-2.0 (by its repository)"}
"""Of packages that hold no licence at all."""
HEAD = """# Licences of what is installed

Written by `python supply/licences.py` from the packages' own metadata; nothing of them is part of
this repository. **Copyleft** marks licences that ask something of who passes the package on.

| package | version | licence | |
|---|---|---|---|
"""


def pins() -> list[tuple[str, str]]:
    """Return (name, version) of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return [(name.strip(), version.strip()) for name, version in pairs]


def licence_of(found: PackageMetadata) -> str:
    """Return a package's licence: its SPDX expression, its classifiers, or its own short text."""
    expression = found.get("License-Expression")
    if expression:
        return str(expression)
    classes = [
        line.rpartition(" :: ")[2]
        for line in found.get_all("Classifier") or []
        if line.startswith("License ::") and line.count("::") > 1
    ]
    text = (found.get("License") or "").strip().splitlines()
    return ", ".join(classes) or (text[0][:60] if text else "") or _of_file(found["Name"])


def _of_file(name: str) -> str:
    """Return what the licence file itself is, where it is one that everybody knows."""
    for path in distribution(name).files or []:
        if path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            text = " ".join(path.read_text(encoding="utf-8").split())
            if "Permission is hereby granted, free of charge" in text:
                return "MIT (by its file)"
            if "Redistribution and use in source and binary forms" in text:
                return "BSD (by its file)"
    return _ELSEWHERE.get(name, "not stated")


def rows() -> Iterable[str]:
    """Yield one line a pinned package; packages not installed here are left to other platforms."""
    for name, version in sorted(pins(), key=lambda pin: pin[0].lower()):
        try:
            licence = licence_of(metadata(name)).replace("|", "/")
        except PackageNotFoundError:
            licence = "not installed where this list was made"
        mark = "**copyleft**" if COPYLEFT.search(licence) else ""
        yield f"| {name} | {version} | {licence} | {mark} |"


if __name__ == "__main__":
    LISTED.write_text(HEAD + "\n".join(rows()) + "\n", encoding="utf-8")
    print(LISTED)
