"""What repeats a study: its settings as a file that the `study` command reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml

from adaptive_lora.analysis.comparison import Comparison

SETTINGS = "settings"
"""Name of the fact that holds a study's settings as JSON."""


def study_file(comparison: Comparison) -> str | None:
    """Return the settings as YAML for `adaptive-lora study --config`; None where not recorded."""
    text = comparison.facts.get(SETTINGS)
    if text is None:
        return None
    return yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True, default_flow_style=None)


def other_facts(comparison: Comparison) -> Mapping[str, str]:
    """Return the facts beside the settings."""
    return {name: value for name, value in comparison.facts.items() if name != SETTINGS}
