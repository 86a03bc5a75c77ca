"""`plan --emit` for axolotl, LLaMA-Factory, torchtune and Unsloth: the ranks that each builds are those of the plan.

Fields, their types and how each tool passes them on are facts of the versions in `VERSIONS`. Where a tool is installed,
its own code reads the form too.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from architectures import write_configuration
from click.testing import CliRunner
from mixtures import settings_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, HfArgumentParser

from adaptive_lora.allocation import MethodSpec, RankPlan
from adaptive_lora.cli import main
from adaptive_lora.config import study_from
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adapters import attach, audit_as_built
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.models.classes import auto_class
from adaptive_lora.runner.plan import PlanReport, plan_method

VERSIONS = {"axolotl": "0.19.0", "llamafactory": "0.9.5", "torchtune": "0.6.1", "unsloth": "2026.10.9"}
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "axolotl": {
        "base_model": str, "adapter": str, "load_in_4bit": bool, "lora_r": int, "lora_alpha": int,
        "lora_target_modules": (str, list), "lora_target_parameters": list,
        "lora_rank_pattern": dict, "lora_alpha_pattern": dict,
        "lora_fan_in_fan_out": bool, "lora_modules_to_save": list, "peft_use_rslora": bool, "peft_use_dora": bool,
        "lora_model_dir": str, "loraplus_lr_ratio": float,
    },
    "llamafactory": {
        "model_name_or_path": str, "adapter_name_or_path": str, "finetuning_type": str, "quantization_bit": int,
        "lora_rank": int, "lora_alpha": int, "lora_target": str, "use_rslora": bool, "use_dora": bool,
        "additional_target": str, "loraplus_lr_ratio": float,
    },
    "torchtune": {
        "lora_attn_modules": list, "apply_lora_to_mlp": bool, "lora_rank": int, "lora_alpha": (int, float),
        "use_dora": bool, "quantize_base": bool,
    },
}  # fmt: skip
"""Tool -> its fields of those that are emitted, with their types; Unsloth's are keywords of PEFT's LoraConfig."""


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PlanReport]:
    """A function that plans a method on an architecture."""
    folder = tmp_path_factory.mktemp("configurations")

    def plan(name: str, method: str, **settings: Any) -> PlanReport:
        place = folder / name if (folder / name).exists() else write_configuration(name, folder)
        return plan_method(study_from({"model": str(place), **settings}), MethodSpec.parse(method))

    return plan


def read(report: PlanReport, form: str, **given: Any) -> dict[str, Any]:
    """Return the emitted settings, after a look at their names and types."""
    text = report.emit(form, **given).text
    found: dict[str, Any] = json.loads(text) if form == "unsloth" else yaml.safe_load(text)
    if form == "torchtune":
        (found,) = found.values()
    if form == "unsloth":
        assert set(found) <= set(inspect.signature(LoraConfig).parameters)
    else:
        assert set(found) <= set(FIELDS[form])
        assert not [name for name, value in found.items() if not isinstance(value, FIELDS[form][name])]
    for pattern in ("lora_rank_pattern", "lora_alpha_pattern"):
        assert all(type(value) is int and value > 0 for value in found.get(pattern, {}).values())
    return found


def config_of(form: str, given: dict[str, Any]) -> LoraConfig:
    """Return the configuration that a tool makes of its settings."""
    if form == "unsloth":
        return LoraConfig(**given)
    if form == "axolotl":
        return LoraConfig(
            r=given["lora_r"],
            lora_alpha=given["lora_alpha"],
            target_modules=given["lora_target_modules"],
            target_parameters=given.get("lora_target_parameters", []),
            fan_in_fan_out=given.get("lora_fan_in_fan_out", False),
            rank_pattern=given.get("lora_rank_pattern", {}),
            alpha_pattern=given.get("lora_alpha_pattern", {}),
            use_rslora=given.get("peft_use_rslora", False),
            use_dora=given.get("peft_use_dora", False),
        )
    return LoraConfig(
        r=given["lora_rank"],
        lora_alpha=given["lora_alpha"],
        target_modules=[name.strip() for name in given["lora_target"].split(",")],
        use_rslora=given.get("use_rslora", False),
        use_dora=given.get("use_dora", False),
    )


def model_of(report: PlanReport) -> nn.Module:
    settings = AutoConfig.from_pretrained(report.base_name)
    torch.manual_seed(0)
    return auto_class(settings).from_config(settings)


Built = dict[str, tuple[int, float, bool]]
"""Site -> rank, scale, DoRA."""


def built(adapted: nn.Module) -> Built:
    return {
        name.removeprefix("base_model.model."): (
            layer.r["default"], layer.scaling["default"], layer.use_dora["default"],
        )
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }  # fmt: skip


def planned(report: PlanReport) -> Built:
    plan = report.plan
    assert isinstance(plan, RankPlan)
    return {entry.site.name: (entry.rank, plan.scale_of(entry), entry.dora) for entry in plan.entries}


@pytest.mark.parametrize("form", ["axolotl", "unsloth"])
@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("llama", "linear_decay:rank=6,low_rank=2", {}),
        ("llama", "linear_decay:rank=6,low_rank=2,dora=true", {"scaling": "rslora"}),
        ("gpt2", "linear_decay:rank=16,low_rank=8", {"scaling": "constant"}),  # attn.c_proj and mlp.c_proj
        ("llava", "linear_decay:rank=6,low_rank=2,towers=vision_tower", {}),  # the other tower has the same endings
        ("qwen2", "uniform:rank=3,layers=first-half", {}),
    ],
)
def test_mixed_ranks_reach_peft(
    form: str, name: str, method: str, settings: dict[str, Any], report_of: Callable[..., PlanReport]
) -> None:
    report = report_of(name, method, **settings)
    assert built(get_peft_model(model_of(report), config_of(form, read(report, form)))) == planned(report)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # a mistake of PEFT 0.21
@pytest.mark.parametrize("form", ["axolotl", "unsloth"])
@pytest.mark.parametrize(
    "name", ["qwen2-moe", "deepseek-v3"]
)  # the latter has dense layers that PEFT takes for experts
def test_routed_experts_reach_peft(name: str, form: str, tmp_path: Path) -> None:
    settings_of(name).save_pretrained(tmp_path)
    config = study_from({"model": str(tmp_path)})
    for method in ("linear_decay:rank=8,low_rank=4,experts=true", "linear_decay:rank=8,low_rank=4"):
        report = plan_method(config, MethodSpec.parse(method))
        given = read(report, form)
        audit_as_built(get_peft_model(model_of(report), config_of(form, given)), report.plan)
        if form == "unsloth":  # which would find experts by itself where it is given none
            assert isinstance(given["target_parameters"], list)
    report = plan_method(config, MethodSpec.parse("uniform:rank=8,experts=true"))
    for wrong in ("llamafactory", "torchtune"):
        with pytest.raises(ConfigError, match=f"required --emit peft, axolotl or unsloth.*{wrong} reads modules alone"):
            report.emit(wrong)
    with pytest.raises(ConfigError, match="without --adapter, because the start of --adapter is that of modules"):
        report.emit("axolotl", adapter=tmp_path / "start")


@pytest.mark.parametrize("method", ["uniform:rank=3", "uniform:rank=3,placement=attention,dora=true"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_one_rank_for_llamafactory(method: str, scaling: str, report_of: Callable[..., PlanReport]) -> None:
    report = report_of("llama", method, scaling=scaling)
    given = read(report, "llamafactory")
    assert "." not in given["lora_target"]
    assert built(get_peft_model(model_of(report), config_of("llamafactory", given))) == planned(report)


@pytest.mark.parametrize(("form", "key"), [("axolotl", "lora_model_dir"), ("llamafactory", "adapter_name_or_path")])
def test_training_starts_from_the_written_adapter(
    form: str, key: str, report_of: Callable[..., PlanReport], tmp_path: Path
) -> None:
    """Alphas are fractions here, which neither tool reads in its own settings."""
    report = report_of("llama", "linear_decay:rank=5,low_rank=3,lora_plus=16", scaling="constant", alpha=24)
    with pytest.raises(ConfigError, match=f"give --adapter FOLDER.*{key}"):
        report.emit(form)
    given = read(report, form, adapter=tmp_path / "start", seed=3)
    assert given[key] == str(tmp_path / "start")
    assert given["loraplus_lr_ratio"] == 16
    model, ids = model_of(report), torch.arange(8)[None]
    before = model(ids).logits
    adapted = PeftModel.from_pretrained(model, given[key], is_trainable=True)
    assert built(adapted) == planned(report)
    assert torch.equal(adapted(ids).logits, before)
    assert isinstance(report.plan, RankPlan)
    trial = lora_layers(attach(model_of(report), report.plan, seed=3, dropout=0.0))
    for site, layer in lora_layers(adapted).items():
        assert layer.lora_A["default"].weight.requires_grad
        assert torch.equal(layer.lora_A["default"].weight, trial[site].lora_A["default"].weight)


TORCHTUNE = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}


@pytest.mark.parametrize("method", ["uniform:rank=4", "uniform:rank=4,placement=attention,dora=true"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_torchtune_has_the_same_factor(method: str, scaling: str, report_of: Callable[..., PlanReport]) -> None:
    report = report_of("qwen2", method, scaling=scaling)
    given = read(report, "torchtune")
    modules = {name for name, own in TORCHTUNE.items() if own in given["lora_attn_modules"]}
    if given["apply_lora_to_mlp"]:
        modules |= {"gate_proj", "up_proj", "down_proj"}
    factor = given["lora_alpha"] / given["lora_rank"]  # of torchtune's LoRALinear
    found = {
        site.name: (given["lora_rank"], pytest.approx(factor, rel=1e-12), given.get("use_dora", False))
        for site in report.sites
        if site.name.rpartition(".")[2] in modules
    }
    assert planned(report) == found


@pytest.mark.parametrize(
    ("name", "method", "form", "message"),
    [
        ("llama", "linear_decay:rank=6,low_rank=2", "torchtune", "ranks from 2 to 6; take --emit peft"),
        ("llama", "uniform:rank=2,placement=feed_forward", "torchtune", "required one of attention"),
        ("llama", "uniform:rank=2,layers=first-half", "torchtune", "other modules in some layers"),
        ("gpt2", "uniform:rank=2", "torchtune", "model type 'gpt2'"),
        ("llama", "linear_decay:rank=6,low_rank=2", "llamafactory", "ranks from 2 to 6; give --adapter FOLDER"),
        ("llava", "uniform:rank=2", "llamafactory", "lora_target cannot name exactly"),
        ("llama", "ia3", "axolotl", "trains ia3, which has no ranks"),
        ("llama", "uniform:rank=2", "trl", "unknown form 'trl'"),
    ],
)
def test_what_a_tool_cannot_read_is_refused(
    name: str, method: str, form: str, message: str, report_of: Callable[..., PlanReport]
) -> None:
    with pytest.raises(ConfigError, match=message):
        report_of(name, method).emit(form)


def test_starts_that_need_weights_or_a_free_folder(report_of: Callable[..., PlanReport], tmp_path: Path) -> None:
    plain = report_of("llama", "uniform:rank=2")
    with pytest.raises(ConfigError, match="DoRA magnitudes depends on the base's weights"):
        report_of("llama", "uniform:rank=2,dora=true").emit("axolotl", adapter=tmp_path / "start")
    with pytest.raises(ConfigError, match="--adapter is for --emit axolotl and llamafactory"):
        plain.emit("peft", adapter=tmp_path / "start")
    with pytest.raises(ConfigError, match=r"splits .* at its comma"):
        plain.emit("llamafactory", adapter=tmp_path / "a,b")
    (tmp_path / "start").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        plain.emit("axolotl", adapter=tmp_path / "start")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_four_bit_bases_and_what_is_lost(report_of: Callable[..., PlanReport]) -> None:
    report = report_of("llama", "uniform:rank=2,base=nf4,lora_plus=16")
    assert read(report, "axolotl")["adapter"] == "qlora"
    assert read(report, "axolotl")["load_in_4bit"] is True
    assert read(report, "llamafactory")["quantization_bit"] == 4
    assert read(report, "torchtune")["quantize_base"] is True
    lost = {form: " ".join(report.emit(form).caveats) for form in ("peft", "axolotl", "unsloth")}
    assert "base in 4 bit" not in lost["axolotl"]
    assert "LoRA+" not in lost["axolotl"]
    for form in ("peft", "unsloth"):
        assert "base in 4 bit" in lost[form]
        assert "LoRA+ is a rate of the optimiser" in lost[form]


def test_command_line(tmp_path: Path) -> None:
    folder = write_configuration("llama", tmp_path)
    words = ["plan", "--model", str(folder), "--method", "linear_decay:rank=6,low_rank=2"]

    def run(*further: str) -> Any:
        return CliRunner().invoke(main, [*words, *further], catch_exceptions=False)

    done = run("--emit", "llamafactory", "--adapter", str(tmp_path / "start"))
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.stdout)["adapter_name_or_path"] == str(tmp_path / "start")
    assert (tmp_path / "start" / "adapter_model.safetensors").is_file()
    assert "get_peft_model(model, **settings)" in run("--emit", "unsloth").stderr
    refused = run("--emit", "torchtune")
    assert refused.exit_code == 2
    assert "torchtune's builders read one lora_rank" in refused.stderr
    assert run("--adapter", str(tmp_path / "other")).exit_code == 2


def own_code(tool: str, path: str) -> ModuleType:
    """Return one module of an installed tool, without the package around it; skip the test where there is none."""
    spec = importlib.util.find_spec(tool)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{tool} is not installed; its fields were read from version {VERSIONS[tool]}")
    (folder,) = spec.submodule_search_locations
    found = importlib.util.spec_from_file_location(f"own_{tool}", Path(folder) / path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_axolotls_schema_reads_the_form(report_of: Callable[..., PlanReport]) -> None:
    schema = own_code("axolotl", "utils/schemas/peft.py").LoraConfig
    given = read(report_of("llama", "linear_decay:rank=6,low_rank=2,dora=true"), "axolotl")
    assert set(given) - {"base_model"} <= set(schema.model_fields), version("axolotl")
    assert schema(**given).lora_rank_pattern == given["lora_rank_pattern"]
    with pytest.raises(ValueError, match="lora_alpha"):
        schema(**{**given, "lora_alpha": 7.5})


def test_llamafactorys_arguments_read_the_form(report_of: Callable[..., PlanReport]) -> None:
    arguments = own_code("llamafactory", "hparams/finetuning_args.py").FinetuningArguments
    given = read(report_of("llama", "uniform:rank=3,dora=true", scaling="rslora"), "llamafactory")
    (found,) = HfArgumentParser(arguments).parse_dict({k: v for k, v in given.items() if k != "model_name_or_path"})
    assert (found.lora_rank, found.lora_alpha, found.use_rslora, found.use_dora) == (3, 32, True, True)
    assert found.lora_target == given["lora_target"].split(",")
    assert not hasattr(found, "rank_pattern")
