"""The earlier study, redone: its study files by name, on local folders where there is no hub."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import rows
from tracked import quiet, runs_in, store_in, trials_in
from zygote import Zygote

from adaptive_lora.allocation import MethodSpec, make_plan
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.config import StudyConfig, load_study

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "entrypoints" / "studies"
SMALL = {
    "max_steps": 2, "batch_size": 2, "accumulation": 2, "max_examples": 30, "seeds": "0",
    "validations": 1, "profile_batches": 1, "generate": "off", "precision": "fp32",
    "template": "compact", "max_tokens": 128,
}  # fmt: skip


@pytest.fixture
def dialogpt_folder(shared_models: Path, tmp_path: Path) -> Path:
    """DialoGPT-medium's configuration shrunk to 3 layers, random weights, the real tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    settings = json.loads((shared_models / "dialogpt-medium" / "config.json").read_text())
    config = GPT2Config(**{**settings, "n_layer": 3, "n_embd": 32, "n_head": 2})
    folder = tmp_path / "dialogpt"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shared_models / "gpt2-tokenizer").save_pretrained(folder)
    return folder


def study(name: str, **changes: object) -> StudyConfig:
    return load_study(STUDIES / f"{name}.yaml", changes)


def as_dolly(made: list[dict[str, str]], path: Path) -> Path:
    """Write rows of Alpaca's columns under Dolly's names."""
    columns = {"instruction": "instruction", "input": "context", "output": "response"}
    renamed = [{columns[key]: row[key] for key in columns} for row in made]
    path.write_text(json.dumps(renamed), encoding="utf-8")
    return path


def test_the_published_setting_is_what_the_files_say() -> None:
    config = study("reference")
    assert config.model.model == "microsoft/DialoGPT-medium"
    assert config.data.max_examples is not None
    kept = 1 - config.data.validation_share - config.data.test_share
    assert config.data.max_examples * kept == pytest.approx(200)
    train = config.train
    assert (train.epochs, train.batch_size, train.accumulation) == (3, 8, 4)
    assert (config.lr, train.dropout) == ((3e-4,), 0.1)
    assert train.alpha == 32
    rates = study("reference_rates")
    assert len(rates.lr) > 1
    assert len(rates.seeds) == 8
    assert study("dolly").data.data == "databricks/databricks-dolly-15k"


@pytest.mark.parametrize("name", ["reference", "reference_rates", "dolly"])
def test_each_runs_on_a_local_folder(name: str, base_folder: Path, empty_store: Path, tmp_path: Path) -> None:
    made = rows(40)
    if name == "dolly":
        as_dolly(made, tmp_path / "rows.json")
    else:
        (tmp_path / "rows.json").write_text(json.dumps(made), encoding="utf-8")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    local = {"model": str(base_folder), "data": str(tmp_path / "rows.json")}
    if name == "reference_rates":
        local |= {"lr": "3e-4 1e-3", "methods": "three_band:budget=uniform-8 waterfill:rank=8"}
    config = study(name, tracking_uri=store_in(tmp_path), **SMALL, **local)
    outcome, shown = quiet(config)
    assert outcome.trials_run == len(config.methods) * len(config.lr)
    assert {run.data.tags["method"] for run in trials_in(tmp_path)} == {spec.label for spec in config.specs}
    assert outcome.study_result.report().is_file()
    assert "FAILED" not in shown


@pytest.mark.parametrize(
    "name",
    [
        "reference",
        pytest.param("reference_rates", marks=pytest.mark.long),
        pytest.param("dolly", marks=pytest.mark.long),
    ],
)
def test_mlflow_runs_it_by_name(
    name: str, dialogpt_folder: Path, shared_data: Path, empty_store: Path, zygote: Zygote, tmp_path: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    data = shared_data / "alpaca_en_demo.json"
    if name == "dolly":
        data = as_dolly(json.loads(data.read_text(encoding="utf-8")), tmp_path / "dolly.json")
    changes = {
        **SMALL, "model": dialogpt_folder, "data": data,
        "methods": "uniform:rank=2 three_band:rank=2", "output": tmp_path / "out",
        "study": name,
    }  # fmt: skip
    words = ["run", str(ROOT), "-e", "main", "--env-manager", "local"]
    for key, value in changes.items():
        words += ["-P", f"{key}={value}"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    code, output = zygote.mlflow(words, tmp_path, {**kept, "PATH": path, "MLFLOW_TRACKING_URI": store_in(tmp_path)})
    assert code == 0, output
    assert len(trials_in(tmp_path)) == 2 * len(study(name).lr)
    (parent,) = [run for run in runs_in(tmp_path) if "mlflow.project.entryPoint" in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["study_id"].startswith(f"{name}-")
    trial = trials_in(tmp_path)[0]
    assert trial.data.params["cfg.dropout"] == "0.1"  # from the study file


def llama_3b() -> Architecture:
    """The attention of Llama-3.2-3B: hidden size 3,072, 28 layers, 8 key heads of width 128."""
    outputs = {Role.QUERY: 3072, Role.KEY: 1024, Role.VALUE: 1024, Role.OUTPUT: 3072}
    sites = [
        AdapterSite(
            name=f"model.layers.{layer}.self_attn.{role[0]}_proj", layer=layer, role=role, in_features=3072,
            out_features=width,
        )
        for layer in range(28)
        for role, width in outputs.items()
    ]  # fmt: skip
    return Architecture(kind="LlamaForCausalLM", sites=tuple(sites))


def comparison_methods() -> list[str]:
    return [spec.options.type if spec.name == "peft" else spec.label for spec in study("peft_comparison").specs]


QUICK = {"uniform-r32-q_proj-v_proj", "MISS", "HIRA", "LOHA", "DELORA"}
"""Methods whose sizes are found in seconds."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in comparison_methods()]
)
def test_methods_of_the_comparison_have_one_number_of_parameters(name: str) -> None:
    """As many as LoRA of rank 32 on q_proj and v_proj has, within 2 %."""
    spec: MethodSpec = dict(zip(comparison_methods(), study("peft_comparison").specs, strict=True))[name]
    plan = make_plan(spec, llama_3b())
    assert abs(plan.trainable_parameters - 9_175_040) <= 0.02 * 9_175_040
