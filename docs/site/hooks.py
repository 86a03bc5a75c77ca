"""Hooks of the documentation site: pages from the repository's root, notebooks, linked files, the API reference.

Links in Markdown are written as they work in the repository. Here those that lead out of `docs/` become links to the
page made of that file (README, CONTRIBUTING ...), or to a copy of the file under `files/`.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from adaptive_lora.cli import main

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "adaptive_lora"
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "supply/LICENCES.md": "licences.md",
}
"""File outside `docs/` -> page of the site."""
COMMANDS = "reference/commands.md"
WIDTH = 96
"""Characters of a line of help text."""
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)#\s]+)((?:#[^)\s]*)?\))")
_SOURCES = {page: source for source, page in ROOT_PAGES.items()}


def reference_pages() -> dict[str, str]:
    """Return page of the API reference -> the package or module that it shows."""
    packages = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    modules = [path.with_suffix("") for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    names = [path.name for path in (*sorted(packages), *sorted(modules)) if path.name != "cli"]
    return {
        "reference/index.md": "adaptive_lora",
        **{f"reference/{name}.md": f"adaptive_lora.{name}" for name in names},
    }


def on_config(config: Any) -> Any:
    """Add the API reference to the navigation."""
    pages = [{name.removeprefix("adaptive_lora."): page} for page, name in reference_pages().items()]
    config.nav.append({"Reference": [pages[0], {"Commands": COMMANDS}, *pages[1:]]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no file of `docs/`, and the files of the repository that pages link to."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=_notebook(notebook)))
    for page, name in reference_pages().items():
        files.append(File.generated(config, page, content=_reference(name)))
    files.append(File.generated(config, COMMANDS, content=_commands()))
    for page in list(files.documentation_pages()):
        for found in LINK.finditer(page.content_string):
            path = _target(page.src_uri, found[2])
            copy = f"files/{path}"
            known = path in ROOT_PAGES or path.startswith("docs/") or copy in files.src_uris
            if not known and (ROOT / path).is_file():
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page with its links as they are on the site."""

    def as_on_site(link: re.Match[str]) -> str:
        path = _target(page.file.src_uri, link[2])
        target = ROOT_PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")
        return link[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + link[3]

    return markdown if page.file.src_uri.startswith("reference/") else LINK.sub(as_on_site, markdown)


def _target(page: str, link: str) -> str:
    """Return the file that a page's link leads to, from the repository's root."""
    folder = posixpath.dirname(_SOURCES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def _notebook(path: Path) -> str:
    """Return a notebook with its outputs as the source of a page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            shown = "".join(data.get("text/html", ""))
            plain = "".join(data["text/plain"]).rstrip()
            parts.append(f'<div class="output" markdown="0">\n{shown}\n</div>' if shown else f"```text\n{plain}\n```")
    parts.insert(1, f"[This page as a notebook]({path.name})")
    return "\n\n".join(parts) + "\n"


def _reference(name: str) -> str:
    """Return the source of a page of the API reference."""
    options = {"show_root_heading": "false", "show_submodules": str(name != "adaptive_lora").lower()}
    lines = [
        f"# {name}",
        "",
        f"::: {name}",
        "    options:",
        *(f"      {key}: {value}" for key, value in options.items()),
    ]
    return "\n".join([*lines, ""])


def _commands() -> str:
    """Return the help text of every command as one page."""
    parts = ["# Commands", "What `adaptive-lora COMMAND --help` prints."]
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"adaptive-lora {name}", terminal_width=WIDTH)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
        for inner, one in sorted(getattr(command, "commands", {}).items()):
            context = click.Context(one, info_name=f"adaptive-lora {name} {inner}", terminal_width=WIDTH)
            parts.append(f"### {name} {inner}\n\n```text\n{one.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"
