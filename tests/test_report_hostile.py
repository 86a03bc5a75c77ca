"""A report on hostile names and examples runs none of them, in a real browser either."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from html_page import Page
from synthetic_study import study
from test_report_browser import dumped

from adaptive_lora.analysis.comparison import compare
from adaptive_lora.analysis.report import About, write_report

ATTACKS = (
    "<script>document.title='ran'</script>",
    "</script><script>document.title='ran'</script>",
    '"><img src=x onerror="document.title=\'ran\'">',
    "' onmouseover='document.title=1' x='",
    "<svg/onload=document.title='ran'>",
    "javascript:document.title='ran'",
    "--><script>document.title='ran'</script>",
    "]]></title><script>document.title='ran'</script>",
    "&lt;script&gt;",
)


def hostile(folder: Path) -> Path:
    """Write a report in which every text from outside is an attack."""
    base, evil = "uniform-r8", f"uniform-r16{ATTACKS[1]}{ATTACKS[2]}"
    records = [
        dataclasses.replace(
            record,
            method=evil if record.method == "uniform-r16" else record.method,
            tags={**record.tags, "data": ATTACKS[0], "packages": ATTACKS[4]},
        )
        for record in study({base: 0.0, "uniform-r16": -0.01}, range(3))
    ]
    facts = dict(zip("abcdefghi", ATTACKS, strict=True))
    facts |= {"base model": ATTACKS[2], "data": ATTACKS[1], "command": ATTACKS[5]}
    ids = records[0].test.example_ids if records[0].test else ()
    examples = {name: ATTACKS[n % len(ATTACKS)] for n, name in enumerate(ids)}
    comparison = compare(records, baseline=base, facts=facts)
    return write_report(comparison, records, folder, About(title=ATTACKS[7], examples=examples))


def test_nothing_hostile_becomes_an_element(tmp_path: Path) -> None:
    path = hostile(tmp_path / "report")
    page = Page(path.read_text(encoding="utf-8"))
    assert len(list(page.root.all("script"))) == 2
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert not (attributes.get("href") or "").startswith("javascript:")
        assert not (tag == "img" and attributes.get("src") == "x")
    for name in ("report.md", "table.csv"):
        text = path.with_name(name).read_text(encoding="utf-8")
        assert name != "report.md" or "<script" not in text
        assert not any(line.startswith(("=", "+", "@")) for line in text.splitlines())


def test_nothing_hostile_runs_in_a_browser(tmp_path: Path) -> None:
    page = dumped(hostile(tmp_path / "report"), tmp_path / "profile")
    (title,) = list(page.root.all("title"))[:1]
    assert title.text != "ran"
    assert "document.title" in page.text  # shown as what it is


def test_the_browser_would_run_what_is_not_escaped(tmp_path: Path) -> None:
    for number, attack in enumerate((ATTACKS[0], ATTACKS[2], ATTACKS[4])):
        path = tmp_path / f"{number}.html"
        path.write_text(f"<title>still</title><p>{attack}</p>", encoding="utf-8")
        page = dumped(path, tmp_path / f"profile{number}")
        assert next(page.root.all("title")).text == "ran", attack
