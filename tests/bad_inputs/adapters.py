"""Adapter folders that are damaged, contradict themselves, or mean harm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
RECORD, CONFIG, WEIGHTS = "adaptive_lora.json", "adapter_config.json", "adapter_model.safetensors"


def edited(name: str, **changes: Any) -> Change:
    """Change fields of a JSON file; `None` as a value is written as null."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**values, **changes}), encoding="utf-8")

    return change


def base(**changes: Any) -> Change:
    """Change fields of the record's base."""

    def change(folder: Path) -> None:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        edited(RECORD, base={**values["base"], **changes})(folder)

    return change


def written(name: str, content: bytes | str) -> Change:
    """Replace a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data) and None


def missing(name: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the tensors."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        values = load_file(folder / WEIGHTS)
        change(values)
        save_file({k: v.contiguous() for k, v in values.items()}, folder / WEIGHTS)

    return apply


def _wider(values: dict[str, Any]) -> None:
    name = next(name for name in values if "lora_A" in name)
    values[name] = values[name].repeat(1, 2)


def _higher(values: dict[str, Any]) -> None:
    name = next(name for name in values if "lora_A" in name)
    values[name] = values[name].repeat(2, 1)


def _nan(values: dict[str, Any]) -> None:
    values[next(iter(values))][0] = float("nan")


def _fewer(values: dict[str, Any]) -> None:
    values.pop(next(iter(values)))


def _renamed(values: dict[str, Any]) -> None:
    name = next(iter(values))
    values["../../" + name] = values.pop(name)


def header(text: str, length: int | None = None) -> Change:
    """Write a safetensors file with a header of its own and 64 bytes of data."""
    data = text.encode()
    size = len(data) if length is None else length
    return written(WEIGHTS, size.to_bytes(8, "little") + data + bytes(64))


def _cut(keep: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return change


def _linked(name: str) -> Change:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        os.replace(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def _pickled(folder: Path) -> None:
    import torch

    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


_ENTRY = '{"a": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'
CASES: Mapping[str, tuple[Change, str]] = {
    "no record": (missing(RECORD), "is no adapter folder"),
    "no configuration": (missing(CONFIG), f"has no {CONFIG}"),
    "no weights": (missing(WEIGHTS), f"has no {WEIGHTS}"),
    "pickled weights": (_pickled, "pickled weights"),
    "an empty record": (written(RECORD, ""), "cannot be read"),
    "a record that is a list": (written(RECORD, "[]"), "required a JSON object"),
    "a record nested without end": (written(RECORD, '{"base":' * 50_000), "cannot be read"),
    "a record without base": (edited(RECORD, base=None), "base.source"),
    "an unknown source": (base(source="ftp"), "base.source"),
    "a base without name": (base(name=""), "base.name"),
    "a base of the wrong type": (base(name=["a"]), "base.name"),
    "a hash that is none": (base(content_hash="../../etc"), "base.content_hash"),
    "another base": (base(content_hash="0" * 64), "content hash"),
    "a base that is gone": (base(source="folder", name="/nowhere"), "not found"),
    "a base upwards": (base(source="folder", name="../" * 12 + "etc"), "config.json"),
    "a base with code": (base(trust_remote_code=True), "unless you say so"),
    "a type that is none": (edited(RECORD, dtype="__class__"), "dtype"),
    "a template without texts": (edited(RECORD, template={"with_input": "a"}), "template"),
    "a template of a list": (edited(RECORD, template=["{prompt}"]), "template"),
    "an unknown task": (edited(RECORD, task={"name": "nope"}), "tasks"),
    "a task of Python": (edited(RECORD, task={"name": "__class__"}), "tasks"),
    "an empty configuration": (written(CONFIG, ""), "cannot be read"),
    "a configuration that is a list": (written(CONFIG, "[]"), "required a JSON object"),
    "no type": (edited(CONFIG, peft_type=None), "peft_type"),
    "an unknown type": (edited(CONFIG, peft_type="EVIL"), "EVIL"),
    "a type of Python": (edited(CONFIG, peft_type="__class__"), "__class__"),
    "a module to import": (
        edited(CONFIG, auto_mapping={"base_model_class": "system", "parent_library": "os"}),
        "auto_mapping",
    ),
    "an auto_mapping of text": (edited(CONFIG, auto_mapping="os"), "auto_mapping"),
    "trust in itself": (edited(CONFIG, trust_remote_code=True), "trust_remote_code"),
    "megatron's module": (
        edited(CONFIG, megatron_config={"a": 1}, megatron_core="antigravity"), "megatron_config",
    ),
    "other adapters": (edited(CONFIG, adapters={"a": "evil/repo"}), "adapters"),
    "arguments for a tokenizer": (
        edited(CONFIG, tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs",
    ),
    "a gigantic rank": (edited(CONFIG, r=10**9), "gives the size"),
    "a negative rank": (edited(CONFIG, r=-1), "gives the size"),
    "a rank of text": (edited(CONFIG, r="8"), "gives the size"),
    "a gigantic rank of one site": (
        edited(CONFIG, rank_pattern={"transformer.h.0.attn.c_attn": 10**9}), "gives the size",
    ),
    "another rank": (edited(CONFIG, r=1, rank_pattern={}), "size mismatch"),
    "a pattern without end": (edited(CONFIG, rank_pattern={"(a+)+$": 2}), "required names"),
    "a target without end": (edited(CONFIG, target_modules="(a|a)*b"), "required names"),
    "targets of numbers": (edited(CONFIG, target_modules=[1, 2]), "required names"),
    "targets that are not there": (edited(CONFIG, target_modules=["nope"]), "nope"),
    "modules to save": (edited(CONFIG, modules_to_save=["ln_f"]), "ln_f"),
    "a bias that is none": (edited(CONFIG, bias="nope"), "nope"),
    "an initialisation that is none": (edited(CONFIG, init_lora_weights="nope"), "nope"),
    "an alpha of text": (edited(CONFIG, lora_alpha="x", alpha_pattern={}), "adapter"),
    "empty weights": (written(WEIGHTS, b""), "is corrupt"),
    "weights that are text": (written(WEIGHTS, "hello " * 100), "is corrupt"),
    "weights cut in the header": (_cut(0.01), "is corrupt"),
    "weights cut in half": (_cut(0.5), "is corrupt"),
    "weights cut at the end": (_cut(0.999), "is corrupt"),
    "a header of 2^60 bytes": (header("{}", 2**60), "is corrupt"),
    "a header that is a list": (header("[]"), "is corrupt"),
    "a header that is not JSON": (header("{'a'"), "is corrupt"),
    "a shape that lies": (header(_ENTRY % ("[1000000]", "[0, 64]")), "is corrupt"),
    "a shape that overflows": (header(_ENTRY % ("[9223372036854775807, 4]", "[0, 64]")), "corrupt"),
    "offsets beyond the file": (header(_ENTRY % ("[16]", "[64, 128]")), "is corrupt"),
    "negative offsets": (header(_ENTRY % ("[16]", "[-64, 0]")), "is corrupt"),
    "tensors of another kind": (header(_ENTRY % ("[16]", "[0, 64]")), "adapter"),
    "a wider A": (tensors(_wider), "size"),
    "a higher A": (tensors(_higher), "size mismatch"),
    "a NaN": (tensors(_nan), "NaN"),
    "a tensor too few": (tensors(_fewer), "missing or unused"),
    "a tensor too many": (
        tensors(lambda v: v.update(extra=next(iter(v.values())).clone())), "extra",
    ),
    "a name upwards": (tensors(_renamed), "../../"),
    "no tensors": (tensors(lambda v: v.clear()), "adapter"),
    "weights elsewhere": (_linked(WEIGHTS), "is a link"),
    "a configuration elsewhere": (_linked(CONFIG), "is a link"),
    "a record elsewhere": (_linked(RECORD), "is a link"),
    "a damaged plan": (written("rank_plan.json", "{"), "rank_plan.json"),
}  # fmt: skip
