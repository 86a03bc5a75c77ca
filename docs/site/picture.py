"""Draw docs/packages.svg: which package imports which, read from the code.

python docs/site/picture.py

An arrow leads from a package to one that it imports. An import that other arrows lead to as well is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "adaptive_lora"
DRAWN = ROOT / "docs" / "packages.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y, EDGE = 120, 34, 46, 44, 16
"""Size of a box, gaps between boxes and the margin, in pixels."""
STYLE = (
    "text{font:600 15px ui-monospace,monospace;text-anchor:middle;fill:#1a237e}"
    "rect{fill:#e8eaf6;stroke:#5c6bc0}path{stroke:#5c6bc0;stroke-width:1.5;fill:none;marker-end:url(#head)}"
)

Graph = Mapping[str, frozenset[str]]


def imports_of_packages() -> Graph:
    """Return package -> the other packages that its files import anywhere."""
    names = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return {name: frozenset(_imported(PACKAGE / name)) & names - {name} for name in sorted(names)}


def _imported(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            yield from (module.split(".")[1] for module in modules if module.startswith("adaptive_lora."))


def _below(graph: Graph, name: str) -> frozenset[str]:
    return graph[name].union(*(_below(graph, other) for other in graph[name]))


def arrows(graph: Graph) -> Graph:
    """Return the fewest imports from which all others follow."""
    return {
        name: frozenset(one for one in others if not any(one in _below(graph, other) for other in others))
        for name, others in graph.items()
    }


def places(graph: Graph) -> dict[str, tuple[float, int]]:
    """Return package -> (column, level); a package stands above all that it imports, near their middle."""
    first = _placed(graph, {})
    above = {name: _middle([first[one][0] for one in graph if name in graph[one]]) for name in graph}
    return _placed(graph, above)


def _placed(graph: Graph, lowest: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """Return places for wanted columns of the packages that import no other."""
    levels: dict[int, list[str]] = {}
    for name in graph:
        levels.setdefault(_level(graph, name), []).append(name)
    found: dict[str, tuple[float, int]] = {}
    for level, names in sorted(levels.items()):
        wanted = {
            name: _middle([found[other][0] for other in graph[name]]) if level else lowest.get(name, 0.0)
            for name in names
        }
        column = float("-inf")
        for name in sorted(names, key=lambda name: (wanted[name], name)):
            column = max(wanted[name], column + 1)
            found[name] = (column, level)
    return found


def _level(graph: Graph, name: str) -> int:
    return max((_level(graph, other) + 1 for other in graph[name]), default=0)


def _middle(columns: list[float]) -> float:
    return sum(columns) / len(columns) if columns else 0.0


def draw(graph: Graph) -> str:
    """Return the picture as SVG."""
    shown = arrows(graph)
    at = places(shown)
    left, top = min(column for column, _ in at.values()), max(level for _, level in at.values())
    pixel = {
        name: (EDGE + (column - left) * (WIDTH + GAP_X), EDGE + (top - level) * (HEIGHT + GAP_Y))
        for name, (column, level) in at.items()
    }
    width = max(x for x, _ in pixel.values()) + WIDTH + EDGE
    height = max(y for _, y in pixel.values()) + HEIGHT + EDGE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">',
        "<title>Which package imports which</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" style="fill:#5c6bc0;stroke:none;marker:none"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" style="fill:#fff;stroke:none"/>',
    ]
    for name, others in sorted(shown.items()):
        x, y = pixel[name]
        for other in sorted(others):
            a, b = pixel[other]
            lines.append(f'<path d="M{x + WIDTH / 2:.0f} {y + HEIGHT:.0f} {a + WIDTH / 2:.0f} {b - 1:.0f}"/>')
    for name, (x, y) in sorted(pixel.items()):
        lines.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>')
        lines.append(f'<text x="{x + WIDTH / 2:.0f}" y="{y + 22:.0f}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    DRAWN.write_text(draw(imports_of_packages()), encoding="utf-8")
    print(DRAWN)
