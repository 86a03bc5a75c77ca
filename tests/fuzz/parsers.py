"""Fuzz what reads files that others made: anything but an error for users is a finding.

    python tests/fuzz/parsers.py -max_total_time=180

The first byte chooses the parser; the rest is the file. Needs `pip install 'adaptive-lora[fuzz]'`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adaptive_lora", "yaml", "json"]):
    from adaptive_lora.allocation import MethodSpec, RankPlan
    from adaptive_lora.config import load_study
    from adaptive_lora.data.row_files import read_csv, read_json, read_tsv
    from adaptive_lora.data.templates import load_template
    from adaptive_lora.errors import AdaptiveLoraError
    from adaptive_lora.methods.importance import ImportanceProfile
    from adaptive_lora.serving import safety as safety
    from adaptive_lora.tracking.journal import CorruptJournal, read_record

FOLDER = Path(tempfile.mkdtemp())
GOOD = {
    safety.RECORD: b'{"base": {"source": "hub", "name": "a", "revision": null, "content_hash": "'
    + b"0" * 64
    + b'"}, "dtype": "float32", "template": {"with_input": "", "without_input": ""}}',
    safety.CONFIG: b'{"peft_type": "LORA", "r": 1, "target_modules": ["a"]}',
    safety.WEIGHTS: len(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}').to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    + bytes(4),
}


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _adapter(name: str, data: bytes) -> None:
    for other, content in {**GOOD, name: data}.items():
        (FOLDER / other).write_bytes(content)
    safety.read_record(FOLDER)
    safety.require_adapter(FOLDER)


def _plan(data: bytes) -> None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    RankPlan.from_dict(values)


PARSERS: dict[str, Callable[[bytes], object]] = {
    "plan": _plan,
    "profile": lambda data: ImportanceProfile.from_json(data.decode("utf-8", "replace")),
    "adapter record": lambda data: _adapter(safety.RECORD, data),
    "adapter configuration": lambda data: _adapter(safety.CONFIG, data),
    "adapter weights": lambda data: _adapter(safety.WEIGHTS, data),
    "study": lambda data: load_study(_file("study.yaml", data), {}),
    "template": lambda data: load_template(str(_file("template.yaml", data))),
    "method": lambda data: MethodSpec.parse(data.decode("utf-8", "replace")),
    "JSON": lambda data: read_json(_file("rows.jsonl", data), lines=data[:1] != b"["),
    "CSV": lambda data: read_csv(_file("rows.csv", data)),
    "TSV": lambda data: read_tsv(_file("rows.tsv", data)),
    "journal": lambda data: read_record(data, 0, FOLDER),
}


def one_input(data: bytes) -> None:
    """Give an input to one parser."""
    if not data:
        return
    parser = list(PARSERS.values())[data[0] % len(PARSERS)]
    with contextlib.suppress(AdaptiveLoraError, safety.UnsafeFiles, CorruptJournal):
        parser(data[1:])


def seeds(folder: Path) -> None:
    """Write an input for each parser to start from."""
    starts = [
        b'{"method": "a", "budget": null, "trainable_parameters": 0, "scale_policy": '
        b'"constant_alpha_over_r", "left_out": [], "certificate": null, "sites": []}',
        b'{"metric": "a", "scores": {"a": 1}, "spectra": null, "replicates": [], "tokens": 1, '
        b'"processed_tokens": 1, "seconds": 1, "seed": 0, "stability": null, "stability_note": ""}',
        *GOOD.values(),
        b"seeds: [0, 1]\nlr: 1e-3\nmethods: [uniform]\n",
        b"with_input: '{prompt}{input}'\nwithout_input: '{prompt}'\n",
        b"random:of=waterfill,rank=8,budget=uniform-4",
        b'{"instruction": "a", "output": 1.5}\n',
        b"instruction,output\na,b\n",
        b"instruction\toutput\na\tb\n",
        b'{"op": "metric", "k": "a", "v": 1.0, "s": 0, "t": 0}',
    ]
    for number, start in enumerate(starts):
        (folder / str(number)).write_bytes(bytes([number]) + start)


if __name__ == "__main__":
    corpus = Path(tempfile.mkdtemp())
    seeds(corpus)
    atheris.Setup([*sys.argv, "-max_len=4096", str(corpus)], one_input)
    atheris.Fuzz()
