"""A merged model of any task is a plain folder that computes what the adapter computed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from task_studies import TASKS, study_of

from adaptive_lora import serving
from adaptive_lora.config import study_from
from adaptive_lora.methods.adapters.export import export_merged
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, run_trial
from adaptive_lora.serving import open_processor

PACKS = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("causal", "regression")])
def test_merged(task: str, tmp_path: Path) -> None:
    methods = "uniform:rank=2 full" + (" uniform:rank=2,base=nf4" if PACKS else "")
    options = {**study_of(task, tmp_path), "methods": methods, "max_steps": 4}
    context = StudyContext(study_from(options))
    for trial in context.config.trials():
        folder = tmp_path / trial.method.label
        run_trial(context, trial, folder)
        export_merged(folder, folder / "merged")
        model = serving.TASKS[task].model_class.from_pretrained(folder / "merged", dtype=torch.float32)
        assert not hasattr(model.config, "quantization_config")
        found = context.task.probe(model, context.splits(0).test)
        torch.testing.assert_close(found, load_file(folder / PROBE)["logits"], rtol=1e-4, atol=1e-4)
        card = (folder / "merged" / "README.md").read_text(encoding="utf-8")
        assert f"{serving.TASKS[task].auto_class}.from_pretrained" in card
        assert open_processor(folder / "merged", {"name": task}) is not None
