"""A page as a parser sees it, for tests of the report."""

from __future__ import annotations

import html.parser
from collections.abc import Iterator
from dataclasses import dataclass, field

VOID = {"meta", "input", "br", "wbr", "link", "img", "hr"}


@dataclass
class Element:
    """One element with its own and its descendants' text."""

    tag: str
    attrs: dict[str, str | None]
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, tag: str) -> Iterator[Element]:
        """Yield descendants of a tag in document order."""
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.all(tag)

    def find(self, tag: str, name: str) -> Element:
        """Return the descendant of a tag with an id."""
        return next(one for one in self.all(tag) if one.attrs.get("id") == name)

    @property
    def text(self) -> str:
        """All text inside, in order."""
        return "".join(self.texts)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the tree, and the text outside style sheets and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.texts.append(data)
        if self._open[-1].tag not in ("style", "script"):
            self.text += data
