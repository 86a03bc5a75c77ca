"""Number of GPUs of a plan: its bytes held to FSDP2's shards and bitsandbytes' layout, and its advice."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

import adaptive_lora as al
from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.cli import main
from adaptive_lora.config import TrainConfig
from adaptive_lora.methods.adapters import attach
from adaptive_lora.models.sharding import is_sharded
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.gpus import engine_advice
from adaptive_lora.training.memory import GPU_SIZES, USABLE, GpuNeed, fit, gpu_needs, storage_of

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
LLAMA_3_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
BYTES = 2


def planned(method: str) -> tuple[Any, RankPlan]:
    """Return a small Llama in bf16 and a plan for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).to(torch.bfloat16).requires_grad_(False)
    return model, allocate(MethodSpec.parse(method), find_sites(model))


@pytest.mark.parametrize("gpus", [2, 3, 5])
def test_shards_are_those_of_fsdp2(gpus: int) -> None:
    model, plan = planned("linear_decay:rank=7,low_rank=3")
    storage = storage_of(model, find_sites(model), packed=False, number_bytes=BYTES)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (gpus,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (gpus,)))
        held = attach(model, plan, seed=0, dropout=0.0).parameters()
        local = [(p.to_local() if is_sharded(p) else p, p.requires_grad) for p in held]  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()
    assert storage.whole == whole
    assert storage.weights(gpus) - storage.gathered == sum(p.nbytes for p, trained in local if not trained)
    assert plan.trainable_parameters == sum(p.numel() for p, trained in local if trained)
    assert storage.gathered > 2 * block


def test_bytes_in_4_bit_are_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = planned("uniform:rank=2,base=nf4")
    sites = find_sites(model)
    storage = storage_of(model, sites, packed=True, number_bytes=BYTES)
    held = scales = 0
    for site in sites:
        weight = model.get_submodule(site.name).weight.data
        packed = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16
        ).to("cpu")
        held += packed.nbytes - weight.nbytes
        scales += packed.quant_state.absmax.nbytes + packed.quant_state.state2.absmax.nbytes
    assert storage.scales == scales
    assert storage.whole == sum(parameter.nbytes for parameter in model.parameters()) + held + scales
    assert storage.dequantised == 64 * 96 * BYTES


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of Llama 3 70B, without weights."""
    folder = tmp_path_factory.mktemp("llama_3_70b")
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**settings, **LLAMA_3_70B}), encoding="utf-8")
    return folder


def test_a_base_of_70_billion_parameters(large: Path) -> None:
    result = CliRunner().invoke(main, ["plan", "--model", str(large), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["total_parameters"] == 70_553_706_496
    needs = {(need["base"], need["fsdp"], need["gpu_gib"]): need for need in document["gpus"]}
    assert len(needs) == 4 * len(GPU_SIZES)
    for (base, fsdp, size), need in needs.items():
        limit = USABLE * size * 2**30
        bits, weights = {"bf16": 16, "nf4": 4.127}[base], document["total_parameters"]  # scales: 8.125 bits for 64
        if need["gpus"] is None:
            assert not fsdp
            assert weights * bits / 8 + 16 * document["trainable_parameters"] > limit
            continue
        assert need["expected"] < need["high"] <= limit
        assert weights * bits / 8 / need["gpus"] < need["expected"]
        assert need["gpus"] == 1 or fsdp
        assert need["micro_batch"] <= math.ceil(8 / need["gpus"])
    numbers = [needs["bf16", True, size]["gpus"] for size in GPU_SIZES]
    assert numbers == sorted(numbers, reverse=True)
    assert needs["nf4", False, 48]["gradient_checkpointing"]
    assert "--use_fsdp --fsdp_version 2 --num_processes" in document["engine"][0]
    assert document["engine"][1].startswith("4 bit (base=nf4) fits on one 48 GB GPU: one trial per GPU")


def test_one_gpu_less_is_too_few() -> None:
    report = al.plan(planned("uniform")[0])
    assert report.load is not None
    storage = storage_of(report.base, report.sites, packed=False, number_bytes=BYTES)
    many = dataclasses.replace(storage, shards={(2**20, 2**16): 10})  # 640 GiB, as if it had larger layers
    for need in gpu_needs(report.load, {"bf16": many}, TrainConfig(batch_size=4)):
        if not need.fsdp:
            assert need.gpus is None
            continue
        assert need.gpus is not None
        assert need.gpus > 1
        share = dataclasses.replace(report.load, weights=many.weights(need.gpus - 1))
        assert fit(share, 1, limit=USABLE * need.gpu_gib * 2**30, checkpointing=True) is None


def test_advice_by_what_fits() -> None:
    report = al.plan(planned("uniform")[0])
    assert report.engine == engine_advice(report.needs)
    assert len(report.engine) == 1
    assert report.engine[0].startswith("bf16 fits on one 16 GB GPU: one trial per GPU, by --devices all")
    assert "GPUs for one trial" not in str(report)
    none = [GpuNeed(base="bf16", fsdp=fsdp, gpu_gib=141, gpus=None, choice=None) for fsdp in (False, True)]
    assert engine_advice(none)[0].startswith("bf16 does not fit, even over 1,024 GPUs of 141 GB: one example")
    assert engine_advice([]) == []


def test_the_table_is_shown_where_more_than_one_gpu_is_needed(large: Path) -> None:
    report = al.plan(large)
    lines = str(report).splitlines()
    assert lines[-4].split()[:3] == ["bf16,", "whole", "base"]
    assert lines[-4].split()[3:] == ["-"] * len(GPU_SIZES)
    assert lines[-1].split()[-3:] == ["1", "1", "1"]
    assert "FSDP2" in report._repr_html_()
    assert {row["base"] for row in report.gpus} == {"bf16", "nf4"}
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    for row in report.gpus.cells:
        assert f"| {' | '.join(row)} |" in page


def test_a_method_without_ranks_and_a_saved_base_have_one_storage(large: Path, tmp_path: Path) -> None:
    assert {need.base for need in al.plan(planned("uniform")[0], "ia3").needs} == {"bf16"}
    settings = json.loads((large / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}), encoding="utf-8")
    assert {need.base for need in al.plan(tmp_path, "uniform:base=nf4").needs} == {"nf4"}
