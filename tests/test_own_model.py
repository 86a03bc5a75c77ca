"""Plans and profiles for a model of one's own: in memory, with batches and a loss of any kind."""

from __future__ import annotations

import json
import logging
import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload
from html_page import Page
from own_models import ARCHITECTURES, Tensors, causal_sum, llama, texts
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import adaptive_lora as al
from adaptive_lora.data import Batch
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError, ModelError
from adaptive_lora.methods.importance import ImportanceProfile

Measured = tuple[Any, ImportanceProfile]
"""A model and its profile."""


@pytest.fixture(scope="module")
def measured() -> Measured:
    """A model and its profile."""
    model = llama()
    return model, al.profile(model, texts())


def test_the_embedded_base_is_planned_by_its_name() -> None:
    uniform, decay = al.plan("embedded"), al.plan("embedded", "linear_decay", budget="uniform-8")
    assert decay.plan.budget == uniform.plan.trainable_parameters // 2


def test_a_profile_is_enough_to_allocate(measured: Measured, tmp_path: Path) -> None:
    model, profile = measured
    (tmp_path / "profile.json").write_text(profile.to_json(), encoding="utf-8")
    alone = al.allocate(tmp_path / "profile.json", "uniform-4")
    assert alone.plan == al.allocate(profile, "uniform-4", model=model).plan
    assert alone.to_dict()["memory"] is alone.total_parameters is None
    assert al.allocate(profile, 3000, "empirical").plan.trainable_parameters <= 3000
    with pytest.raises(AllocationError, match=r"empirical.* follows gradient_norm, but .* measured whitened_gradient"):
        al.allocate(profile, 3000, "empirical:metric=gradient_norm")
    with pytest.raises(AllocationError, match=r"uniform.* follows no importance profile"):
        al.allocate(profile, 3000, "uniform")
    with pytest.raises(AllocationError, match="budget"):
        al.allocate(profile, 3)
    with pytest.raises(ConfigError, match=r"profile .*nowhere\.json cannot be read"):
        al.allocate(tmp_path / "nowhere.json", 3000)
    with pytest.raises(ConfigError, match=r"required one: al\.allocate"):
        alone.emit("peft")


def test_a_profile_of_an_earlier_version_asks_for_its_model(measured: Measured) -> None:
    model, profile = measured
    values = profile.to_dict()
    del values["sites"]
    earlier = ImportanceProfile.from_json(json.dumps(values))
    with pytest.raises(AllocationError, match="earlier version wrote it; required model="):
        al.allocate(earlier, "uniform-4")
    assert al.allocate(earlier, "uniform-4", model=model).plan == al.allocate(profile, "uniform-4").plan


def test_a_profile_of_another_model_is_refused(measured: Measured) -> None:
    _, profile = measured
    for model, words in (
        (llama(width=48), "with 32 inputs and 32 outputs, this model has 48 and 48"),
        (llama(layers=1), "scores for 7 sites that this model lacks, such as model.layers.1"),
        (llama(layers=3), "no score for 7 of 21 sites"),
    ):
        with pytest.raises(AllocationError, match=words):
            al.plan(model, "waterfill", profile=profile)


def test_a_plan_is_shown_in_text_and_in_a_notebook(measured: Measured) -> None:
    model, profile = measured
    report = al.allocate(profile, "uniform-4", model=model)
    assert report.table[0]["site"] == "model.layers.0.self_attn.q_proj"
    assert sum(row["parameters"] for row in report.table) == report.plan.trainable_parameters
    assert {row["site"]: row["rank"] for row in report.table} == report.plan.rank_pattern()
    page = Page(report._repr_html_()).root
    sites, figures = page.all("table")
    assert len(list(sites.all("tr"))) == 1 + len(report.table)
    assert [cell.text for cell in next(sites.all("tr")).all("th")] == list(report.table.head)
    labels = [cell.text for cell in figures.all("th")]
    assert labels[:3] == ["trainable", "as much as", "memory"]
    for text in (str(report), report._repr_html_()):
        assert "model.layers.1.mlp.down_proj" in text
        assert f"{report.plan.trainable_parameters:,} of {report.total_parameters:,} parameters" in text
    assert len(repr(report)) < 200


def test_names_are_escaped_in_a_notebook() -> None:
    block = torch.nn.Module()
    block.add_module("<b>[red]", torch.nn.Linear(4, 4))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    report = al.plan(model, rank=2)
    assert "layers.0.&lt;b&gt;[red]" in report._repr_html_()
    assert "<b>[red]" not in report._repr_html_()
    assert "layers.0.<b>[red]" in str(report)


def scores(profile: ImportanceProfile) -> np.ndarray[Any, Any]:
    return np.array(list(profile.scores.values()))


def own_loss(model: Any, batch: Tensors) -> torch.Tensor:
    """Return the mean loss of next tokens as a script computes it."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return causal_sum(model, Batch(inputs=inputs, labels=batch["labels"])) / 44


def test_a_profile_is_that_of_the_loss_and_changes_nothing() -> None:
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = al.profile(model, texts())
    own = al.profile(model, [dict(batch, extra="of the script") for batch in texts()], loss=own_loss)
    assert np.corrcoef(scores(plain), scores(own))[0, 1] > 0.9  # halves are of batches here, of examples there
    given = al.profile(model, [{**batch, "position_ids": torch.arange(12).expand(4, 12)} for batch in texts()])
    assert scores(given) == pytest.approx(scores(own), rel=1e-4)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_several_metrics_are_measured_in_one_pass() -> None:
    model, passes = llama(), 0

    def counted(model: Any, batch: Tensors) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return own_loss(model, batch)

    metrics = ["weight_gradient", "whitened_gradient", "stable_rank"]
    found = al.profile(model, texts(), metric=metrics, loss=counted)
    assert list(found) == metrics
    together, passes = passes, 0
    al.profile(model, texts(), metric="whitened_gradient", loss=counted)
    assert together == passes
    assert found["weight_gradient"].together == ("weight_gradient", "whitened_gradient")
    for metric in metrics:
        alone = al.profile(model, texts(), metric=metric, loss=own_loss)
        np.testing.assert_allclose(scores(found[metric]), scores(alone), rtol=1e-6)


def test_loaders_of_any_kind_are_read_up_to_a_number_of_batches() -> None:
    model, batches = llama(), texts(4)
    once = al.profile(model, (batch for batch in batches), batches=4)
    endless = al.profile(model, cycle(batches), batches=4)
    assert scores(endless) == pytest.approx(scores(once))
    assert endless.tokens == 4 * 4 * 11


@pytest.mark.parametrize("metric", ["whitened_gradient", "weight_gradient", "stable_rank", "activation_spectrum"])
def test_a_model_placed_by_a_device_map_is_measured_alike(metric: str, tmp_path: Path) -> None:
    whole = llama()
    whole.save_pretrained(tmp_path / "model")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    split = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    loader = None if metric == "stable_rank" else texts()
    wanted = scores(al.profile(whole, loader, metric=metric))
    for place in ({"": "cpu"}, split, None):
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=place, offload_folder=tmp_path / "offload"
        )
        if place is None:
            placed = cpu_offload(placed, execution_device=torch.device("cpu"))
        found = al.profile(placed, loader, metric=metric)
        assert scores(found) == pytest.approx(wanted, rel=1e-4)
        assert al.plan(placed, rank=2).plan == al.plan(whole, rank=2).plan


@pytest.mark.parametrize("storage", ["nf4", "8 bit"])
def test_a_model_in_few_bits_is_measured_and_audited(storage: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llama(64).save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packing = BitsAndBytesConfig(**four) if storage == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing)
    for metric in ("activation_spectrum", "weight_gradient"):  # neither may change the model
        assert len(al.profile(model, texts(), metric=metric).scores) == 14
    profile = al.profile(model, texts())
    assert np.corrcoef(scores(profile), scores(al.profile(llama(64), texts())))[0, 1] > 0.9
    report = al.allocate(profile, "uniform-4", model=model)
    assert report.plan.base == ("nf4" if storage == "nf4" else "full")
    al.audit(
        peft.get_peft_model(model, al.lora_config(model, "waterfill", budget="uniform-4", profile=profile)), report
    )
    with pytest.raises(ConfigError, match="base=nf4 is how a model is loaded, and this one is loaded already"):
        al.plan(model, "uniform:base=nf4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_measured_alike() -> None:
    wanted = al.profile(llama(), texts())
    for loss in (None, own_loss):
        on_cpu = wanted if loss is None else al.profile(llama(), texts(), loss=loss)
        found = al.profile(llama().to("cuda"), texts(), loss=loss)
        assert scores(found) == pytest.approx(scores(on_cpu), rel=1e-3)


def without(name: str) -> list[Tensors]:
    return [{key: value for key, value in batch.items() if key != name} for batch in texts()]


LOADERS: dict[str, tuple[Any, str]] = {
    "none": (None, "required a dataloader: this metric is measured on data"),
    "empty": ([], "the dataloader gave 0 batches; required at least 2"),
    "exhausted": (iter(()), "gave 0 batches; .* a generator gives its batches once"),
    "one": (texts(1), "the dataloader gave 1 batch; required at least 2"),
    "no iterable": (3, "required a dataloader, an iterable of batches; got int"),
    "texts": (["a", "b"], "the dataloader gives str; required mappings"),
    "tuples": ([(batch["input_ids"], batch["labels"]) for batch in texts()], "the dataloader gives tuple; required"),
    "no labels": (without("labels"), "batch 0 has no labels, only input_ids, attention_mask; required `labels`"),
    "other keys": ([{**batch, "text": "a"} for batch in texts()], "LlamaForCausalLM does not take text of the batches"),
    "lists": ([{"input_ids": [1, 2], "labels": [1, 2]}] * 2, "labels of batch 0 is a list; required tensors"),
    "examples": ([{k: v[0] for k, v in batch.items()} for batch in texts()], "batch 0 is a single example, of shape"),
    "shared tensors": ([{k: b["labels"][0] for k in b} for b in texts()], "batch 0 is a single example, of shape"),
    "short mask": ([{**b, "attention_mask": torch.ones(4, 5)} for b in texts()], r"has shape \(4, 5\), input_ids"),
    "whole labels": ([{**b, "labels": b["labels"].int()} for b in texts()], "cannot be profiled on these batches: Run"),
    "unknown labels": ([{**b, "labels": b["labels"] + 1000} for b in texts()], "IndexError.*Target .* is out of"),
    "ignored": ([{**b, "labels": torch.full((4, 12), -100)} for b in texts()], "all labels of batch 0 are -100"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_cannot_be_used_is_refused(name: str, measured: Measured) -> None:
    given, words = LOADERS[name]
    with pytest.raises((AllocationError, ModelError), match=words):
        al.profile(measured[0], given)


LOSSES: dict[str, tuple[Any, str]] = {
    "nan": (lambda m, b: own_loss(m, b) * float("nan"), "the loss of batch 0 is nan; required a finite one"),
    "infinite": (lambda m, b: own_loss(m, b) / 0, "the loss of batch 0 is inf; required a finite one"),
    "vector": (lambda m, b: own_loss(m, b).expand(3), r"the loss is a tensor of shape \(3,\); required a scalar"),
    "number": (lambda m, b: 3.0, "the loss is 3.0; required a scalar tensor"),
    "detached": (lambda m, b: own_loss(m, b).detach(), "the loss has no gradient: it was detached"),
    "other": (lambda m, b: torch.ones((), requires_grad=True) * 2, "every site scores 0"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_cannot_be_used_is_refused(name: str, measured: Measured) -> None:
    loss, words = LOSSES[name]
    with pytest.raises((AllocationError, ModelError), match=words):
        al.profile(measured[0], texts(), loss=loss)


def test_an_error_of_the_script_stays_its_own(measured: Measured) -> None:
    with pytest.raises(KeyError, match="weights"):
        al.profile(measured[0], texts(), loss=lambda model, batch: batch["weights"].sum())


def test_what_is_no_model_is_refused(measured: Measured) -> None:
    model = llama()
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    for given, words in (
        (tokenizer, "required a loaded model .* got a TokenizersBackend"),
        (peft.LoraConfig(), "required a loaded model .* got a LoraConfig"),
        (torch.nn.Linear(2, 2), "Linear has no adaptable site"),
        (torch.nn.DataParallel(model), "DataParallel wraps a model .* its attribute module"),
        (peft.get_peft_model(llama(), peft.LoraConfig()), "PeftModel has adapters already"),
        (peft.get_peft_model(llama(), peft.LoraConfig()).base_model.model, "LlamaForCausalLM has adapters already"),
    ):
        with pytest.raises(ModelError, match=words):
            al.profile(given, texts())
        with pytest.raises(ModelError, match=words):
            al.plan(given)
    with pytest.raises(ModelError, match=r"required a loaded model .* got the text 'gpt2'"):
        al.profile("gpt2", texts())
    with pytest.raises(ModelError, match=r"base model folder ./nowhere does not exist"):
        al.plan("./nowhere")


def test_a_model_that_gives_no_gradient_or_no_finite_weight_is_refused() -> None:
    with torch.inference_mode():
        made = llama()
    with pytest.raises(ModelError, match=r"made under torch\.inference_mode"):
        al.profile(made, texts())
    broken = llama()
    torch.nn.init.constant_(broken.model.layers[0].mlp.up_proj.weight, float("nan"))
    with pytest.raises(ModelError, match=r"the weight of model\.layers\.0\.mlp\.up_proj is not finite"):
        al.profile(broken, metric="heavy_tail")


def test_a_model_that_was_compiled_in_place_is_measured_as_it_is(measured: Measured) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("compiled")

    model = llama()
    model.compile(backend=never)
    assert al.profile(model, texts()).scores == measured[1].scores


def test_a_layer_in_two_places_is_refused() -> None:
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    for call in (lambda: al.plan(model), lambda: al.profile(model, texts())):
        with pytest.raises(ModelError, match=r"one layer in several places: model\.layers\.1\.mlp\.\w+ and 2 more"):
            call()


def test_a_model_whose_weights_are_elsewhere_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no weights for .* on the meta device"):
        al.profile(empty, texts())
    assert al.plan(empty).plan == al.plan(llama()).plan
    eight = llama()
    eight.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        eight.model.layers[0].mlp.up_proj.weight.data.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(
        ModelError, match=r"stores .*up_proj.weight as torch.float8_e4m3fn, which profiling cannot read"
    ):
        al.profile(eight, texts())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with pytest.raises(ModelError, match=r"is sharded .*required the whole model"):
            al.profile(fully_shard(llama(), mesh=mesh), texts())
    finally:
        torch.distributed.destroy_process_group()


def test_methods_options_and_metrics_are_checked(measured: Measured, caplog: pytest.LogCaptureFixture) -> None:
    model, profile = measured
    refused: list[tuple[Any, type[Exception], str]] = [
        (lambda: al.profile(model, texts(), metric="gradientnorm"), AllocationError, "did you mean 'gradient_norm'"),
        (lambda: al.profile(model, texts(), metric="ablation"), AllocationError, "ablation looks at trained adapters"),
        (
            lambda: al.profile(model, texts(), metric="gradient_variance", loss=own_loss),
            AllocationError,
            "compares single",
        ),
        (lambda: al.profile(model, texts(), batches=1), AllocationError, "whole number of at least 2.*got 1"),
        (lambda: al.profile(model, texts(), metric=3), AllocationError, "unknown metric '3'"),
        (lambda: al.profile(model, texts(), loss="mse"), AllocationError, "loss must be a function .* got 'mse'"),
        (lambda: al.plan(model, al.MethodSpec.parse("uniform")), ConfigError, "method must be text.*got MethodSpec"),
        (lambda: al.profile(model, texts(), seed=-1), AllocationError, "seed must be a whole number .*got -1"),
        (lambda: al.plan(model, "waterfill", profile=[1]), ConfigError, "required a profile from .* got list"),
        (lambda: al.allocate(profile, None), ConfigError, "budget must be a whole number .* got None"),
        (lambda: al.lora_config(model, dropout=1), ConfigError, "dropout must be a number .* got 1"),
        (lambda: al.plan(None), ModelError, "required a loaded model, or .* got None"),
        (lambda: al.plan(model, seed="1"), ConfigError, "seed must be a whole number of at least 0; got '1'"),
        (lambda: al.lora_config(model, "waterfil"), ConfigError, "did you mean 'waterfill'"),
        (lambda: al.lora_config(model, rnk=3), ConfigError, "unknown option of uniform 'rnk'; did you mean 'rank'"),
        (lambda: al.lora_config(model, rank=0), ConfigError, "rank must be at least 1; got 0"),
        (lambda: al.lora_config(model, "adalora"), ConfigError, "changes ranks or weights before or in training"),
        (lambda: al.lora_config(model, "ia3"), ConfigError, "gives no LoRA ranks"),
        (lambda: al.lora_config(model, "lr_only:of=linear_decay"), ConfigError, "learning rates of its own"),
        (lambda: al.lora_config(model, "waterfill", dataloader=texts(), profile=profile), ConfigError, "got both"),
        (lambda: al.plan(model, "waterfill"), AllocationError, "required profile=, from al.profile"),
        (lambda: al.plan(model, revision="main"), ConfigError, "revision applies to a model given by its name"),
        (lambda: al.plan(model, budget=100), AllocationError, "budget"),
        (lambda: al.profile(model, texts(), metric=[]), AllocationError, "required at least one"),
        (lambda: al.profile(model, texts(), metric=["stable_rank"] * 2), AllocationError, "each once"),
        (lambda: al.profile(model, texts(), metric=["nuclear"]), AllocationError, "unknown metric"),
        (lambda: al.allocate({"a": 1.0}, 3), ConfigError, "required a profile from al.profile, or its file; got dict"),
        (lambda: al.audit(model, al.plan(model)), AdapterError, "has no adapter named 'default'"),
        (lambda: al.audit(model, peft.LoraConfig()), AdapterError, "required the plan .* got LoraConfig"),
    ]
    for call, kind, words in refused:
        with pytest.raises(kind, match=words):
            call()
    with caplog.at_level(logging.WARNING, logger="adaptive_lora"):
        al.profile(model, texts(), metric="stable_rank")
        al.lora_config(model, dataloader=texts())
        al.plan(model, profile=profile)
        al.lora_config(model, loss=own_loss)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "stable_rank looks at weights alone: dataloader and loss are not used.",
        "uniform-r16 follows no measurement: the dataloader is not read.",
        "uniform-r16 follows no importance profile: the one given is not used.",
        "uniform-r16 measures nothing here: the loss is not used.",
    ]


def test_audit_names_every_difference(measured: Measured) -> None:
    report = al.plan(llama(), "linear_decay", rank=6, low_rank=2)
    adapted = peft.get_peft_model(llama(), al.lora_config(llama(), "uniform", rank=6))
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.q_proj: rank is 6, planned 2"):
        al.audit(adapted, report)
    with_ia3 = al.plan(llama(), "ia3")
    (folder := Path("ia3")).mkdir()
    (folder / "adapter_config.json").write_text(with_ia3.emit("peft").text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on settings that it reads back
        scaled = peft.get_peft_model(llama(), peft.PeftConfig.from_pretrained("ia3"))
    al.audit(scaled, with_ia3)


def test_a_classifier_keeps_its_head_trained() -> None:
    make, batches, _ = ARCHITECTURES["bert"]
    report = al.allocate(al.profile(make(), batches()), "uniform-2", model=make())
    assert report.head == ("classifier",)
