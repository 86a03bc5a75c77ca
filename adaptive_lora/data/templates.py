"""Prompt templates: built-in ones by name, others from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import yaml

from adaptive_lora.config.text_files import Unreadable, parse_yaml, read_text
from adaptive_lora.errors import DataError, unknown_name

_FIELD = re.compile(r"\{[A-Za-z_][\w.\[\]!:]*\}")
"""Pattern of a field; other braces are text."""


def load_template(name: str) -> Mapping[str, str]:
    """Return {with_input, without_input} of a built-in template or a YAML file of the same form.

    Raises:
        DataError: the template does not exist, or the file lacks one of the two texts.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return _read_file(Path(name))
    built_in = yaml.safe_load((files(__package__) / "templates.yaml").read_text(encoding="utf-8"))
    if name not in built_in:
        raise DataError(unknown_name("template", name, built_in) + ", or a .yaml file")
    template: dict[str, str] = built_in[name]
    return template


def _read_file(path: Path) -> Mapping[str, str]:
    try:
        values, _ = parse_yaml(read_text(path))
    except Unreadable as error:
        raise DataError(f"template file {path} cannot be read: {error}") from error
    texts = values if isinstance(values, dict) else {}
    missing = [
        key
        for key in ("with_input", "without_input")
        if not isinstance(texts.get(key), str) or "{prompt}" not in texts[key]
    ]
    if missing:
        raise DataError(
            f"template file {path}: required the texts with_input and without_input, each with "
            f"{{prompt}}; wrong or missing: {', '.join(missing)}"
        )
    template = {key: str(texts[key]) for key in ("with_input", "without_input")}
    others = sorted(set(_FIELD.findall("".join(template.values()))) - {"{prompt}", "{input}"})
    if others or "{input}" not in template["with_input"]:
        raise DataError(
            f"template file {path}: required {{prompt}}, and {{input}} in with_input, and no "
            f"other field; got {', '.join(others) or 'no {input}'}"
        )
    return template
