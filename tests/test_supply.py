"""Pins, hashes and licences agree, and an audit that asked nobody is none."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def locked() -> dict[str, tuple[str, str, list[str]]]:
    """Return package -> (version, marker, SHA-256 digests) of requirements.lock, line by line."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    digests: list[str] = []
    for line in (ROOT / "supply" / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if pin := re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; ([^;\\@]+))? \\", line):
            digests = []
            found[canonicalize_name(pin[1])] = (pin[2], pin[3] or "", digests)
        else:
            digest = re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line)
            assert digest is not None, f"no pin and no hash: {line}"
            digests.append(digest[1])
    return found


def test_the_lock_holds_the_pins_each_with_hashes() -> None:
    lock = locked()
    pins = {canonicalize_name(name): version for name, version in script("licences").pins()}
    assert {name: lock.get(name, ("none",))[0] for name in pins} == pins, "run `make lock`"
    assert all(digests for _, _, digests in lock.values())
    for name in lock.keys() - pins.keys():  # of CUDA or another system
        assert re.search("sys_platform == '(linux|darwin|win32|emscripten)'", lock[name][1]), name


def test_the_lock_covers_what_the_project_asks_for() -> None:
    lock = locked()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    for line in (line for lines in asked for line in lines):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == project["name"]:  # an extra that is several of the others
            continue
        assert lock[name][0] in requirement.specifier, f"{name}: run `make lock`"
    for lines in asked:
        names = [canonicalize_name(Requirement(line).name) for line in lines]
        assert len(names) == len(set(names)), "one stands twice"


CLEAN = {"name": "a", "version": "1.0", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI"}
HIT = {
    "name": "c", "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["GHSA-x"], "fix_versions": ["2.1"]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("report", "answers", "code", "says"),
    [
        ({"dependencies": [CLEAN]}, {}, 0, "1 packages asked about, 0 findings"),
        ({"dependencies": [CLEAN, SKIPPED]}, {}, 3, "1 packages could NOT be asked about"),
        ({"dependencies": []}, {}, 3, "names no package"),
        ("no route to host", {}, 3, "not asked: no route to host"),
        ({"dependencies": [HIT]}, {}, 1, "c 2.0: PYSEC-1, fixed in 2.1: NO ANSWER"),
        ({"dependencies": [HIT]}, {"GHSA-x": "not called"}, 0, "not called"),
        ({"dependencies": [HIT, SKIPPED]}, {}, 1, "could NOT"),
        ({"dependencies": [HIT, SKIPPED]}, {"PYSEC-1": "not called"}, 3, "could NOT"),
    ],
)
def test_an_audit_that_could_not_ask_is_no_clean_one(
    report: object, answers: dict[str, str], code: int, says: str
) -> None:
    found, lines = script("audit").judge(report, answers)
    assert found == code
    assert says in "\n".join(lines)


def test_an_auditor_that_fails_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    audit = script("audit")
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="a\nno network\n")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: done)
    assert audit.report_of("pypi") == "no network"
    assert audit.main() == audit.NOT_ASKED


def test_answers_are_texts() -> None:
    answers = tomllib.loads(script("audit").ANSWERS.read_text(encoding="utf-8"))
    assert all(isinstance(answer, str) and answer.strip() for answer in answers.values())
