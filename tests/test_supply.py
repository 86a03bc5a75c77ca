"""The list of licences fits the pins, and a lock holds hashes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """Return a script of `supply/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "supply" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pin_has_a_licence() -> None:
    licences = script("licences")
    text = licences.LISTED.read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| (\S+) \|", text, re.MULTILINE))
    pinned = dict(licences.pins())
    assert {name: listed.get(name) for name in pinned} == pinned, "run supply/licences.py"
    assert "not stated" not in text
    assert "not installed" not in text


@pytest.mark.parametrize(
    ("licence", "marked"),
    [("MIT", False), ("LGPL-3.0-or-later", True), ("GPL-2.0", True), ("MPL-2.0", True),
     ("Apache-2.0", False), ("GNU Lesser General Public License v2", True)],
)  # fmt: skip
def test_copyleft_is_marked(licence: str, marked: bool) -> None:
    assert bool(script("licences").COPYLEFT.search(licence)) == marked


def test_a_locked_line_has_its_hash() -> None:
    lock = script("lock")
    item = {
        "metadata": {"name": "a", "version": "1.0"},
        "download_info": {"archive_info": {"hashes": {"sha256": "0" * 64}}},
    }
    assert lock.line_of(item) == f"a==1.0 \\\n    --hash=sha256:{'0' * 64}"
    with pytest.raises(SystemExit, match="no hash of b"):
        lock.line_of({"metadata": {"name": "b", "version": "1"}, "download_info": {}})
