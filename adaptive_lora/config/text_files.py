"""Small text files: read within size limits, and YAML without implicit types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LONGEST = 16 * 2**20
"""Maximum size of a settings file, template or profile, in bytes; real ones are far smaller."""
_DEEPEST = 20
"""Maximum nesting depth of mappings and lists; settings need two levels."""


class _TextLoader(yaml.SafeLoader):
    """Reads every plain value but null as the text in the file.

    YAML's own types make 64 of `0100`, 90 of `1:30`, 1.1 of `1.10` and true of `on`.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - of the base class
        first: [(tag, form) for tag, form in known if tag == "tag:yaml.org,2002:null"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Unreadable(ValueError):
    """A file that cannot be read; the message gives the reason for the user."""


def read_text(path: Path) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        Unreadable: the file does not exist, is a device, is too large, or is not UTF-8.
    """
    try:
        if not path.exists():
            raise Unreadable("there is no such file")
        if not path.is_file():
            raise Unreadable("it is no regular file")
        if path.stat().st_size > LONGEST:
            raise Unreadable(f"it has {path.stat().st_size:,} bytes; at most {LONGEST:,} are read")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(str(error)) from error


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """Return the value of a YAML text, and key -> line number of a top-level mapping.

    Every value but a list, mapping or null is text, as written. Python objects, anchors (a few of
    them can expand to gigabytes) and repeated keys (of which YAML's reader silently takes the last)
    are refused.

    Raises:
        Unreadable: the problem, with its line number where known.
    """
    try:
        _require_plain(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _TextLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise Unreadable(f"it is not YAML: {error}") from error
    except ValueError as error:  # a number or date that Python cannot hold
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"it holds a value that cannot be used: {error}") from error
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise Unreadable(f"'{name}' is given twice, in lines {lines[name]} and {line}")
        lines[name] = line
    return values, lines


def _require_plain(text: str) -> None:
    """Check YAML events one by one, so that a hostile text is refused before it is expanded."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise Unreadable("it is nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable("it uses anchors (`*name`), which are not read; write the value out")
