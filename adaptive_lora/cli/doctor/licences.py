"""What the makers of base and data allow, as far as their cards say."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from adaptive_lora.cli.doctor.finding import Finding, ok, warn
from adaptive_lora.config import StudyConfig

_CARD = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.S)
_PERMISSIVE = re.compile(
    r"apache-2\.0|mit|bsd(-.*)?|cc0-1\.0|cc-by-[234]\.0|unlicense|isc|pddl|odc-by|cdla-permissive-.*"
)
_LONGEST = 2**20
_PATIENCE = 4


def base_licence(config: StudyConfig) -> Finding:
    """Say under which licence the base is published."""
    name = "licence of base"
    if config.model.model == "embedded":
        return ok(name, "apache-2.0 (part of this package)")
    folder = Path(config.model.model)
    if folder.is_dir():
        return _judged(name, _of_folder(folder), f"{folder}/README.md")
    return _judged(name, _of_hub(config.model.model, "model"), config.model.model)


def data_licence(config: StudyConfig) -> Finding:
    """Say under which licence the data are published."""
    name = "licence of data"
    if config.data.data == "embedded":
        return ok(name, "apache-2.0 (made by this package)")
    path = Path(config.data.data).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return _judged(name, _of_folder(folder), f"{folder}/README.md")
    return _judged(name, _of_hub(config.data.data, "dataset"), config.data.data)


def _judged(check: str, licence: str | None, where: str) -> Finding:
    if licence is None:
        return warn(check, f"not stated in {where}; find out before you share an adapter")
    if _PERMISSIVE.fullmatch(licence.lower()):
        return ok(check, licence)
    return warn(check, f"{licence}: read what it asks of adapters that you share")


def _of_folder(folder: Path) -> str | None:
    """Return the licence that a model's or data set's card states in its first lines."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > _LONGEST:
        return None
    return _stated(card.read_text(encoding="utf-8", errors="replace"))


def _stated(card: str) -> str | None:
    found = _CARD.match(card)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError):
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    if licence == "other":
        licence = values.get("license_name") or licence  # type: ignore[union-attr]
    return str(licence)[:100] if licence else None


def _of_hub(name: str, kind: str) -> str | None:
    """Return the licence on the hub, from the cache or with one short question."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "README.md", repo_type=kind)
        if isinstance(cached, str):
            return _of_folder(Path(cached).parent)
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        card = ask(name, timeout=_PATIENCE).card_data
    except Exception:  # offline, private, misspelt: the other checks say which
        return None
    licence = None if card is None else card.get("license")
    return None if licence is None else str(licence)
