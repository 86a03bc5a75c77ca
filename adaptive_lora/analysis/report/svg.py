"""SVG for the page: a figure whose parts know their method and say their numbers.

Artists carry what they are in their gid (`mark`), which matplotlib writes as the id of their SVG
group. `to_svg` turns it into `data-m`, which the page's script shows, hides and moves by, and
into `<title>` elements, which every browser shows on hover without any script.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from matplotlib.artist import Artist
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1b1c1f", "#6a6d75", "#d5d8de", "#fffffe"
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
"""Colours of figures in files -> those of the page, which follow its dark mode."""
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_MARK, _LAYOUT = "mark ", "layout "
"""Beginnings of the ids that hold, as JSON, an artist's method and texts, and a figure's layout."""
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DECIMALS = re.compile(r"(\d+\.\d{2})\d+")


def mark(artist: Artist, method: int | None, texts: Sequence[str] = ()) -> None:
    """Say which method an artist belongs to, and what to show on hover.

    Args:
        artist: line, collection, text or axes.
        method: place of the method in the comparison; None: of no single one.
        texts: one for all of the artist, or one per marker or cell in drawing order.
    """
    artist.set_gid(_MARK + json.dumps([method, [clean(text).replace("\n", " ") for text in texts]]))


def mark_layout(figure: Figure, places: Sequence[int], *, columns: int, step: tuple[float, float], head: float) -> None:
    """Say how a figure's methods are laid out, so that the page can leave some out and close up.

    Args:
        figure: whose marked artists are one slot each.
        places: places of the methods, slot by slot.
        columns: slots in a row.
        step: inches from one slot to the next, right and down; right is 0 where there is room for
            one column only.
        head: inches above the first row.
    """
    points = {name: f"{72 * inches:.2f}" for name, inches in zip(("right", "down", "head"), (*step, head), strict=True)}
    figure.set_gid(_LAYOUT + json.dumps({"order": ",".join(map(str, places)), "columns": str(columns), **points}))


def clean(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def to_svg(figure: Figure, name: str) -> tuple[str, str]:
    """Return SVG for a file of its own, and SVG to be put into the page.

    The latter has its own ids, the page's colours, and no names from outside.
    """
    ElementTree.register_namespace("", _SVG.strip("{}"))
    ElementTree.register_namespace("xlink", _XLINK.strip("{}"))
    root = _parsed(figure)
    alone = ElementTree.tostring(root, encoding="unicode")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.removeprefix(_XLINK), _localised(key, value, name))
    kept = {key: root.attrib[key] for key in root.attrib if key.startswith("data-")}
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true", **kept}
    return alone, ElementTree.tostring(root, encoding="unicode")


def _parsed(figure: Figure) -> ElementTree.Element:
    """Return the figure's SVG tree, marks resolved, without metadata."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, dpi=200)  # of pictures in it
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    for element in root.iter():
        if "d" in element.attrib:
            element.set("d", _DECIMALS.sub(r"\1", element.attrib["d"]))
        given = element.attrib.get("id", "")
        if given.startswith((_MARK, _LAYOUT)):
            del element.attrib["id"]
        if given.startswith(_MARK):
            method, texts = json.loads(given.removeprefix(_MARK))
            if method is not None:
                element.set("data-m", str(method))
            _entitle(element, [text for text in texts if text])
        elif given.startswith(_LAYOUT):
            for key, value in json.loads(given.removeprefix(_LAYOUT)).items():
                root.set(f"data-{key}", value)
    return root


def _entitle(group: ElementTree.Element, texts: Sequence[str]) -> None:
    """Add hover texts: to the group, or one to each of its drawn parts."""
    parts = list(_drawn(group))
    if len(texts) > 1 and len(parts) == len(texts):
        for part, text in zip(parts, texts, strict=True):
            ElementTree.SubElement(part, f"{_SVG}title").text = text
    elif len(texts) == 1:
        title = ElementTree.Element(f"{_SVG}title")
        title.text = texts[0]
        group.insert(0, title)


def _drawn(group: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for child in group:
        if child.tag in (f"{_SVG}use", f"{_SVG}path"):
            yield child
        elif child.tag != f"{_SVG}defs":
            yield from _drawn(child)


def _localised(key: str, value: str, name: str) -> str:
    """Return an attribute with ids made the figure's own and colours made the page's."""
    if key == "id":
        return f"{name}-{value}"
    if key == f"{_XLINK}href":
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for colour, variable in PAGE_COLOURS.items():
            value = value.replace(colour, variable)
    return value
