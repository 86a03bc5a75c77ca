"""What a reader's eyes need: contrast, colours that differ, and SVG that holds any text."""

from __future__ import annotations

import re
from importlib.resources import files
from xml.etree import ElementTree

import matplotlib.style
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from synthetic_study import study

from adaptive_lora.analysis.comparison import compare
from adaptive_lora.analysis.report.style import STYLE, colour_of, folded, glyph_of, marker_of
from adaptive_lora.analysis.report.svg import mark, to_svg

CSS = files("adaptive_lora.analysis.report").joinpath("page.css").read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    """Return relative luminance as WCAG 2.2 defines it."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palettes() -> dict[str, dict[str, str]]:
    """Return the page's colours by medium: light, dark, print."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    light, dark, paper = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", one)) for one in blocks)
    return {"light": light, "dark": {**light, **dark}, "print": {**light, **paper}}


@pytest.mark.parametrize("medium", ["light", "dark", "print"])
def test_text_can_be_read(medium: str) -> None:
    colours = palettes()[medium]
    for ink in ("ink", "muted", "good", "bad", "even", "open"):
        for ground in ("paper", "card"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["bad"], colours["alert-paper"]) >= 4.5


def test_thirty_methods_are_told_apart_by_colour_and_sign() -> None:
    labels = dict.fromkeys(["uniform-r8", *(f"m{i}" for i in range(29))], 0.0)
    comparison = compare(study(labels, range(1)), baseline="uniform-r8")
    looks = {(colour_of(comparison, one), marker_of(comparison, one)) for one in labels}
    assert len(looks) == len(labels)
    signs = {(colour_of(comparison, one), glyph_of(comparison, one)) for one in labels}
    assert len(signs) == len(labels)


@pytest.mark.parametrize("label", ["a_b-c@d", "no-separator" * 3, "x" * 40, "@", ""])
def test_folding_keeps_every_letter(label: str) -> None:
    lines = folded(label, 10).split("\n")
    assert "".join(lines) == label
    assert all(len(line) <= 10 or not re.search(r"[-_](?=.)", line) for line in lines)


CJK = "\N{CJK UNIFIED IDEOGRAPH-4E2D}"
NASTY = f"\x00</title><script>&\"'\N{SYMBOL FOR RECORD SEPARATOR}\n\ud800{CJK}"


def test_any_text_can_be_a_hover_text() -> None:
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        (dots,) = axes.plot([1, 2, 3], [1, 2, 3], "o")
        mark(dots, 4, ["first", NASTY, "third"])
        alone, inline = to_svg(figure, "name")
    for text, space in ((alone, "{http://www.w3.org/2000/svg}"), (inline, "")):
        root = ElementTree.fromstring(text)
        (group,) = [part for part in root.iter(f"{space}g") if part.get("data-m") == "4"]
        titles = [title.text or "" for title in group.iter(f"{space}title")]
        assert [titles[0], titles[2]] == ["first", "third"]
        assert "</title><script>&\"'" in titles[1]
        assert titles[1].endswith(CJK)
        assert root.find(f".//{space}script") is None
    assert not re.search(r'(?<!-)\bid="(?!name-)', inline)
