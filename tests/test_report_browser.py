"""The page's script in a real browser, where one is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from html_page import Page
from synthetic_study import EFFECTS, study

from adaptive_lora.analysis.comparison import compare
from adaptive_lora.analysis.report import About, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OFFLINE = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",  # room for six frames beside each other, four are drawn
)


def dumped(path: Path, profile: Path) -> Page:
    """Return the page as it stands after its script ran."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, *OFFLINE, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Page(run.stdout)


def test_script_runs_under_the_pages_own_policy(tmp_path: Path) -> None:
    records = study(EFFECTS, range(3), rates=(1e-4, 3e-4))
    comparison = compare(records, baseline="uniform-r8")
    path = write_report(comparison, records, tmp_path / "report", About(title="t"))
    before = Page(path.read_text(encoding="utf-8")).root
    after = dumped(path, tmp_path / "profile").root
    assert "hidden" in before.find("fieldset", "picker").attrs
    assert "hidden" not in after.find("fieldset", "picker").attrs
    heads = list(next(after.find("table", "result").all("thead")).all("th"))
    assert heads
    assert all(next(head.all("button")).text == head.text for head in heads)
    assert list(before.find("figure", "rank_maps").all("title"))
    assert not list(after.find("figure", "rank_maps").all("title"))  # the script shows them
    moved = [g for g in after.find("figure", "rank_maps").all("g") if "transform" in g.attrs]
    assert len({g.attrs["transform"] for g in moved if "data-m" in g.attrs}) > 1
