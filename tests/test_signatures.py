"""Identities of trials and studies stay as they were, whatever is moved, renamed or rewritten.

`fixtures/signatures.json` was written by `python tests/test_signatures.py` before the package was
restructured. A difference means that stored trials are not found any more, so it is rewritten only
with a new version of the signatures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from allocation_cases import NEEDED

from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.config import study_from
from adaptive_lora.runner.context import StudyContext

LIST = Path(__file__).parent / "fixtures" / "signatures.json"
WITH_OPTIONS = (
    "uniform:rank=8,scaling=rslora",
    "uniform:rank=4,alpha=16",
    "uniform:rank=4,base=nf4",
    "uniform:rank=4,lora_plus=16,dora=true",
    "uniform:rank=4,layers=0-1",
    "linear_decay:rank=8,direction=up",
    "empirical:rank=8,metric=gradient_norm",
    "empirical:rank=4,profiled_on=velu_words",
    "waterfill:rank=4,abstain=0.05",
    "lr_only:of=waterfill,rank=4",
    "truncate:rank=4,start_rank=12",
    "prompt_tuning:tokens=8",
    "houlsby:budget=uniform-8",
    *(f"uniform:rank=4,init={start}" for start in ("pissa", "olora", "corda", "lora_ga", "eva", "orthogonal")),
    "uniform:rank=4,init=loftq,base=nf4",
    "waterfill:rank=4,lora_fa=true",
    "uniform:rank=4,alora=###",
    "uniform:rank=4,experts=true",
    "peft:type=MISS,budget=uniform-8",
    "peft:type=GRALORA,r=8,gralora_k=4,placement=attention",
    "peft:type=DELORA,of=waterfill,rank=8,budget=uniform-8",
    "peft:type=HIRA,budget=uniform-8,base=nf4",
    "planted:min_rank=none",
    "given:ranks=c_attn=4+c_fc=2",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 16, "scaling": "rslora"},
    {"data": "rows.jsonl", "template": "compact", "max_tokens": 128, "epochs": 2},
    {"folds": 5, "precision": "bf16", "weight_decay": 0.1, "loss_on": "all"},
    {"task": "classification", "on_bad_row": "skip", "max_examples": 40},
)
SURROUNDINGS = {"base": "ba5e", "data": "da7a", "tokens": "70c5", "precision": "fp32"}
SMALL = {"max_examples": 60, "max_steps": 4, "precision": "fp32", "lr": "1e-2", "seeds": "0"}


def of_settings() -> dict[str, str]:
    """Return settings and method -> signature of its trial, for a made-up base and data."""
    found = {}
    for settings in SETTINGS:
        for method in (*sorted(METHODS.keys() - NEEDED.keys()), *WITH_OPTIONS):
            trial = next(study_from({**settings, "methods": method}).trials())
            found[f"{json.dumps(settings)} {method}"] = trial.signature(SURROUNDINGS)
    return found


def of_embedded() -> dict[str, str]:
    """Return study id, lineage and signatures on the embedded base and tasks."""
    methods = "uniform:rank=2 empirical:rank=2"
    context = StudyContext(study_from({**SMALL, "methods": methods}))
    found = {"study_id": context.study_id, "lineage": context.study_key, **context.fingerprint}
    for trial in context.config.trials():
        found[trial.label] = context.signature(trial)
    return found


@pytest.mark.parametrize("part", ["settings", "embedded"])
def test_identities_are_those_of_the_list(part: str) -> None:
    found = {"settings": of_settings, "embedded": of_embedded}[part]()
    assert found == json.loads(LIST.read_text(encoding="utf-8"))[part]


def test_every_method_is_in_the_list() -> None:
    listed = json.loads(LIST.read_text(encoding="utf-8"))["settings"]
    assert {key.split()[-1].partition(":")[0] for key in listed} >= set(METHODS)


if __name__ == "__main__":
    everything = {"settings": of_settings(), "embedded": of_embedded()}
    LIST.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
