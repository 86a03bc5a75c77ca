"""The files of an adapter that are published, and the facts of its card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.tuner_plan import Plan, read_plan
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdapterError, brief
from adaptive_lora.methods.adapters.export import copy_trained, export_merged, export_uniform, origin_of
from adaptive_lora.models.errors import is_bug
from adaptive_lora.runner.loaded import adapter_files, is_address
from adaptive_lora.serving import load_adapter
from adaptive_lora.serving.safety import UnsafeFiles, read_json, require_adapter

if TYPE_CHECKING:
    from adaptive_lora.tracking.registry import AdapterHistory

_PUBLISHED = (".json", ".md", ".safetensors", ".txt", ".jinja", ".model")
"""Suffixes of files without code: weights, settings, tokenizers."""
_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Pattern of the name of a data set on the hub."""


def prepare(
    config: StudyConfig, adapter: str, form: str, folder: Path, licence: str | None
) -> tuple[str, tuple[str, ...]]:
    """Write the files to publish into a new folder; return the method's label and the names of files left out.

    Args:
        config: tracking store, and whether the base's own code may run.
        adapter: folder or address of the adapter.
        form: one of `runner.push.FORMS`.
        folder: folder to create.
        licence: the hub's name of the adapter's licence.

    Raises:
        AdapterError: there is no such adapter, it is unsafe, or it does not load on its base.
    """
    source = adapter_files(adapter, config.tracking)
    try:
        require_adapter(source)
    except UnsafeFiles as error:
        raise AdapterError(str(error)) from error
    origin = origin_of(source)
    history = None
    if is_address(adapter):
        from adaptive_lora.tracking import connect
        from adaptive_lora.tracking.registry import adapter_history

        history = adapter_history(connect(config.tracking, must_exist=True), adapter)
    trust = config.model.trust_remote_code
    published = {
        "licence": licence,
        "base_is_local": origin["base"]["source"] in ("folder", "gguf"),
        "plan": _table(source),
        "data": _data(history),
        "verdict": {} if history is None else history.decision,
        "test_loss": None if history is None else history.metrics.get("test/loss"),
        "proven": _proof(history) or _load(source, trust),
    }
    if form == "uniform":
        export_uniform(source, folder, trust_remote_code=trust, published=published)
    elif form == "merged":
        export_merged(source, folder, trust_remote_code=trust, published=published)
    else:
        copy_trained(source, folder, published)
    _remove_paths(folder, str(origin["base"]["name"]))
    _require_no_code(folder, trust)
    left_out = {path.name for path in source.iterdir()} - {path.name for path in folder.iterdir()}
    return str(origin.get("method", "an adapter")), tuple(sorted(left_out)) if form == "trained" else ()


def _table(source: Path) -> dict[str, Any]:
    """Return the ranks of a plan as tables of layers and roles, one a tower; without tables for other tuners."""
    path = source / "rank_plan.json"
    if not path.is_file():
        return {}
    plan: Plan = read_plan(read_json(path))
    found: dict[str, Any] = {"parameters": plan.trainable_parameters, "budget": plan.budget, "towers": []}
    if not isinstance(plan, RankPlan):
        return found
    found["scaling"] = str(plan.scaling)
    for tower in dict.fromkeys(entry.site.tower for entry in plan.entries):
        entries = [entry for entry in plan.entries if entry.site.tower == tower]
        cells: dict[tuple[int, str], dict[str, None]] = {}
        for entry in entries:
            cells.setdefault((entry.site.layer, str(entry.site.role)), {})[str(entry.rank)] = None
        roles = list(dict.fromkeys(str(entry.site.role) for entry in entries))
        rows = [
            [str(layer), *("/".join(cells.get((layer, role), {})) or "0" for role in roles)]
            for layer in sorted({entry.site.layer for entry in entries})
        ]
        found["towers"].append({"name": tower, "roles": roles, "rows": rows})
    return found


def _data(history: AdapterHistory | None) -> dict[str, Any]:
    """Return the data that an adapter was trained on; of a local file the name alone."""
    if history is None:
        return {}
    given = {key: value for key, value in history.params.items() if value != "None"}
    name = given.get("cfg.data", "")
    on_hub = _DATASET.fullmatch(name) is not None and not Path(name).suffix and not Path(name).exists()
    return {
        "name": name if on_hub else Path(name).name,
        "on_hub": on_hub,
        "subset": given.get("cfg.data_subset"),
        "revision": given.get("cfg.data_revision"),
        "examples": given.get("data.train_examples"),
        "digest": history.tags.get("data_digest", ""),
        "seed": given.get("trial.seed"),
        "lr": given.get("trial.lr"),
    }


def _proof(history: AdapterHistory | None) -> dict[str, Any]:
    """Return the proof that was made when an adapter was registered; empty: there is none."""
    tags: Mapping[str, str] = {} if history is None else history.decision
    names = {"logits": "reload_max_logit_difference", "losses": "reload_max_loss_difference"}
    return {key: tags[name] for key, name in names.items()} if set(names.values()) <= tags.keys() else {}


def _load(source: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Load an adapter without a registered proof on its base, as a server would: every tensor used and finite.

    Raises:
        AdapterError: that fails.
    """
    try:
        load_adapter(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # PEFT, transformers and safetensors raise their own types
        if is_bug(error):
            raise
        raise AdapterError(
            f"adapter {source} has no proof of a registration and cannot be loaded on its base ({brief(error)}); "
            "nothing was pushed. Push a registered version (models:/NAME@champion), or give the base, as by "
            "ADAPTIVE_LORA_BASE."
        ) from error
    return {}


def _remove_paths(folder: Path, base: str) -> None:
    """Replace the path of a local base by its last part in all files that name it."""
    if not Path(base).is_absolute():
        return
    name = Path(base).name
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            continue
        text = path.read_text(encoding="utf-8")
        clean = text.replace(base, name).replace(json.dumps(base)[1:-1], name)
        if clean != text:
            path.write_text(clean, encoding="utf-8")


def _require_no_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse files that could run, or whose kind is unknown; a merged base keeps its own code if that was allowed."""
    wrong = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix not in _PUBLISHED and not (trust_remote_code and path.suffix == ".py")
    )
    if wrong:
        raise AdapterError(
            f"{', '.join(wrong)} can hold code or is of an unknown kind; nothing was pushed. Required files of "
            f"{', '.join(_PUBLISHED)}, and for a merged base with code of its own --trust-remote-code true."
        )
