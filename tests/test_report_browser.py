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
from adaptive_lora.analysis.report.formats import render_page

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


def test_long_tables_are_paged_and_methods_can_be_searched(tmp_path: Path) -> None:
    records = study({f"uniform-r{rank}": 0.001 * rank for rank in range(1, 61)}, range(2))
    comparison = compare(records, baseline="uniform-r1")
    text = render_page(comparison, (), About(title="t"), "")
    assert "later" not in {attrs.get("class") for _, attrs in Page(text).tags}  # without the script all rows are there
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    after = dumped(path, tmp_path / "profile").root
    rows = list(next(after.find("table", "result").all("tbody")).all("tr"))
    assert [row.attrs.get("class") == "later" for row in rows] == [False] * 50 + [True] * 10
    pagers = [p for p in after.all("p") if p.attrs.get("class") == "pager"]
    assert pagers[0].text == "1 to 50 of 60previousnextall"
    # A name to search for, as if typed before the script ran.
    typed = text.replace('type="search"', 'type="search" value="R5"')
    assert typed != text
    path.write_text(typed, encoding="utf-8")
    found = dumped(path, tmp_path / "profile").root
    rows = list(next(found.find("table", "result").all("tbody")).all("tr"))
    shown = [next(row.all("th")).text[1:] for row in rows if row.attrs.get("class") in (None, "", "winner")]
    assert shown == ["uniform-r5", *(f"uniform-r{rank}" for rank in range(50, 60))]
