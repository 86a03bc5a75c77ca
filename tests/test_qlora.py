"""QLoRA: any allocation over a 4-bit base, beside LoRA in one study; proven, served, merged."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import save_byte_tokenizer
from peft_matrix import spec_of
from safetensors.torch import load_file
from task_bases import ENCODERS, save_base
from task_studies import T5, WIDE
from tracked import quiet, trials_in, words_of
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig, StudyConfig
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import AdapterError, ConfigError, ModelError
from adaptive_lora.methods.adapters import attach, audit_as_built, detach
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.methods.importance.gradient import weight_of
from adaptive_lora.methods.peft_types.table import TYPES
from adaptive_lora.models.base import count_parameters, load_base, skeleton
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.plan import plan_method
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import NF4, load_adapter, load_model, packed_layers
from adaptive_lora.serving.quantised import dequantised
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder
from adaptive_lora.training.memory import estimate, load_of

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)
CAUSAL = {"name": "causal"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def saved(config: Any, folder: Path) -> Path:
    """Write a model with random weights and the byte tokenizer."""
    save_byte_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of width 64, the least that bitsandbytes decodes rightly on a CPU."""
    config = GPT2Config(
        vocab_size=258, n_positions=128, n_embd=64, n_layer=2, n_head=2,
        bos_token_id=256, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("wide_gpt2"))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 64 and 2 layers."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("wide_llama"))


@pytest.fixture
def options(options: dict[str, object], wide_gpt2: Path) -> dict[str, object]:
    """Options of a small study on the wider base."""
    return {**options, "model": str(wide_gpt2)}


@pytest.mark.parametrize("base", ["wide_gpt2", "wide_llama"])
def test_the_quantised_base_is_the_same_base_in_4_bit(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    config = ModelConfig(model=str(folder))
    full = load_base(config, torch.float32)
    packed = load_base(config, torch.float32, quantisation=NF4)
    assert packed.reference == full.reference  # the hash is that of the weights as saved
    assert packed.total_parameters == full.total_parameters
    assert find_sites(packed.model) == find_sites(full.model)
    with torch.no_grad():
        exact, close = full.model(IDS).logits, packed.model(IDS).logits
        if base == "wide_llama":  # the other has dropout
            assert torch.equal(packed.model.train()(IDS).logits, close)
    assert 0 < float((exact - close).abs().max()) < 0.5 * float(exact.abs().max())
    modules = dict(full.model.named_modules())
    for site in find_sites(packed.model):
        packed_weight = weight_of(packed.model.get_submodule(site.name))
        weight = weight_of(modules[site.name])
        assert packed_weight.shape == weight.shape == (site.out_features, site.in_features)
        assert float((packed_weight - weight).norm()) < 0.15 * float(weight.norm())


@pytest.fixture(scope="module")
def wide_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of width 64 and 2 + 2 layers."""
    folder = tmp_path_factory.mktemp("wide_t5")
    return save_base(folder, "T5Config", T5, "T5ForConditionalGeneration")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("base", ["wide_gpt2", "wide_llama", "wide_t5"])
def test_memory_in_the_plan_is_that_of_the_model(base: str, precision: str, request: pytest.FixtureRequest) -> None:
    config = ModelConfig(model=str(request.getfixturevalue(base)))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    task = {"name": "seq2seq"} if base == "wide_t5" else CAUSAL
    bones = skeleton(config)
    sites = find_sites(bones)
    for method, quantisation in (("uniform:rank=2", None), ("uniform:rank=2,base=nf4", NF4)):
        plan = allocate(MethodSpec.parse(method), sites)
        load = load_of(bones, sites, plan, precision=Precision(precision), longest=8)
        expected = estimate(load, examples=1, checkpointing=False)
        assert expected.adapters == 16 * plan.trainable_parameters
        model = load_base(config, dtype, task, quantisation).model
        held = sum(p.nbytes for p in model.parameters())
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                held += state.absmax.nbytes + state.state2.absmax.nbytes
        assert expected.weights == held
        assert count_parameters(model) == count_parameters(bones)


def test_what_an_architecture_does_not_take_in_4_bit_is_planned_as_it_is(wide_t5: Path) -> None:
    """T5 casts what goes into `wo` to the type of its weight, so that stays a weight of floats."""
    config = ModelConfig(model=str(wide_t5))
    packed = load_base(config, torch.float32, {"name": "seq2seq"}, NF4).model
    sites = find_sites(packed)
    assert sites == find_sites(skeleton(config))
    assert {s.name.rpartition(".")[2] for s in sites if not s.packable} == {"wo"}
    report = plan_method(StudyConfig(model=config), MethodSpec.parse("uniform:rank=2,base=nf4"))
    plan = report.plan
    assert isinstance(plan, RankPlan)
    assert "4 of 32 sites, such as encoder.block.0.layer.1.DenseReluDense.wo" in str(report.note)
    assert RankPlan.from_dict(json.loads(plan.to_json())) == plan
    adapted = attach(packed, plan, seed=0, dropout=0.0)
    audit_as_built(adapted, plan)
    told = dataclasses.replace(sites[0], packable=False)
    entries = tuple(
        dataclasses.replace(entry, site=told) if entry.site == sites[0] else entry for entry in plan.entries
    )
    with pytest.raises(AdapterError, match="base is nf4, planned full"):
        audit_as_built(adapted, dataclasses.replace(plan, entries=entries))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_head_is_never_in_4_bit(name: str, tmp_path: Path) -> None:
    """Not that of the checkpoint's own task either, whose weights are not random."""
    kind, settings, _ = ENCODERS[name]
    wide = {"dim": 64, "hidden_dim": 128} if name == "distilbert" else WIDE
    saved_as = kind.replace("Config", "ForSequenceClassification")
    folder = save_base(tmp_path / "base", kind, {**settings, **wide}, saved_as)
    task = {"name": "classification", "labels": ["no", "yes"]}
    base = load_base(ModelConfig(model=str(folder)), torch.bfloat16, task, NF4)
    assert base.missing_keys == ()
    sites = find_sites(base.model)
    assert all(site.packable for site in sites)
    assert packed_layers(base.model) == {site.name for site in sites}
    for part in base.head:
        for parameter in base.model.get_submodule(part).parameters():
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    "method",
    [
        "uniform:rank=2",
        "uniform:rank=2,dora=true,lora_plus=4",
        "empirical:rank=2",
        "waterfill:rank=2",
        "empirical:rank=2,metric=stable_rank",
        "adalora:rank=2",
        "grow_prune:rank=2,interval=1",
        "eva:rank=2",
        "gora:rank=2",
        "truncate:rank=2",
    ],
)
def test_any_allocation_over_a_4_bit_base(make_bench: BaseContext, tmp_path: Path, method: str) -> None:
    context = make_bench(methods=f"{method},base=nf4", seeds="0", max_steps=8, profile_batches=2)
    assert context.base_kind == "nf4"  # no method of this study needs the weights as saved
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert outcome.plan.base == outcome.plan.to_dict()["base"] == "nf4"
    assert outcome.test.loss < context.base_scores(0).loss
    model, _, record = load_adapter(outcome.folder)
    assert record["quantisation"] == {"scheme": "nf4", "double": True}
    again = context.losses(model, context.splits(0).test)
    assert (again.nll_E == outcome.test.nll_E).all()
    probe = load_file(outcome.folder / PROBE)["logits"]
    assert torch.equal(probe_logits(context, model, 0), probe)


@pytest.fixture(scope="module")
def as_decoded(wide_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide Llama with the weights that its 4 bits stand for."""
    folder, config = tmp_path_factory.mktemp("as_decoded"), ModelConfig(model=str(wide_llama))
    packed = load_base(config, torch.float32, quantisation=NF4).model
    dequantised(packed, skeleton(config), torch.float32).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


PACKED = [kind for kind, facts in TYPES.items() if facts.packed]


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no", "ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("HIRA", "MISS") else pytest.mark.long) for kind in PACKED]
)
def test_types_of_adapters_over_a_4_bit_base(
    kind: str, make_bench: BaseContext, wide_llama: Path, as_decoded: Path, tmp_path: Path
) -> None:
    """They are trained as over the weights that the 4 bits stand for."""
    found = []
    for base, storage in ((wide_llama, ",base=nf4"), (as_decoded, "")):
        context = make_bench(methods=spec_of(kind) + storage, model=str(base), seeds="0", max_steps=4, lr="1e-2")
        outcome = run_trial(context, next(context.config.trials()), tmp_path / f"adapter{storage}")
        model, _, _ = load_adapter(outcome.folder)
        assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()
        found.append([outcome.plan.trainable_parameters, *outcome.train.losses, *outcome.test.nll_E])
    assert outcome.test.loss < context.base_scores(0).loss
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_type_that_takes_no_conv1d_takes_it_packed(make_bench: BaseContext, wide_gpt2: Path, tmp_path: Path) -> None:
    """It is then a linear layer, for the plan without weights too."""
    context = make_bench(methods="peft:type=MISS,r=4,base=nf4", seeds="0")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    report = plan_method(context.config, context.config.specs[0])
    assert outcome.plan == report.plan
    assert report.plan.base == outcome.plan.to_dict()["settings"]["base"] == "nf4"


@pytest.mark.parametrize("kind", ["DELORA", "UNILORA", "C3A"])
def test_types_that_a_4_bit_base_breaks_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"does not train type={kind} over a base in 4 bit; required one of BEFT"):
        MethodSpec.parse(f"peft:type={kind},base=nf4")


def test_lora_and_qlora_in_one_study(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    methods = "uniform:rank=2 uniform:rank=2,base=nf4 empirical:rank=2,base=nf4"
    config = in_store(methods=methods, seeds="0 1", profile_batches=2, lr="1e-2", max_steps=4)
    outcome, _ = quiet(config)
    trials = trials_in(tmp_path)
    assert len(trials) == 6
    assert len({run.data.tags["base_hash"] for run in trials}) == 1
    by_label = {run.data.tags["method"]: run for run in trials}
    plain, packed = by_label["uniform-r2"], by_label["uniform-r2-nf4"]
    assert "quantisation" not in plain.data.tags
    assert packed.data.tags["quantisation"] == "nf4"
    assert packed.data.metrics["base/quantised_loss"] > 0
    for name in ("total_parameters", "trainable_parameters"):
        assert packed.data.metrics[name] == plain.data.metrics[name]
    folder = adapter_folder(packed.data.tags[MODEL_TAG])
    requirements = (folder.parents[1] / "requirements.txt").read_text()
    assert "bitsandbytes==" in requirements
    plain_folder = adapter_folder(plain.data.tags[MODEL_TAG]).parents[1]
    assert "bitsandbytes" not in (plain_folder / "requirements.txt").read_text()
    assert outcome.study_result.champion is not None


def test_a_qlora_adapter_is_proven_and_registered(in_store: Callable[..., StudyConfig]) -> None:
    outcome, _ = quiet(in_store(methods="uniform:rank=2,base=nf4", seeds="0 1"))
    assert outcome.study_result.champion is not None
    found = outcome.store.client.get_model_version_by_alias("adaptive-lora", "champion")
    assert found.tags["method"] == "uniform-r2-nf4"


def test_each_trial_has_its_own_base(make_bench: BaseContext, tmp_path: Path) -> None:
    """A QLoRA trial gives the same numbers alone and beside LoRA, and leaves the other base be."""
    both = make_bench(methods="uniform:rank=2 uniform:rank=2,base=nf4", seeds="0")
    before = both.base.model(IDS).logits
    plain, packed = both.config.trials()
    shared = run_trial(both, packed, tmp_path / "shared")
    assert torch.equal(both.base.model(IDS).logits, before)
    first = run_trial(both, plain, tmp_path / "plain")
    alone = make_bench(methods="uniform:rank=2,base=nf4", seeds="0")
    own = run_trial(alone, next(alone.config.trials()), tmp_path / "alone")
    assert (own.test.nll_E == shared.test.nll_E).all()
    assert (own.test.nll_E != first.test.nll_E).any()
    assert both.signature(packed) == alone.signature(next(alone.config.trials()))
    assert both.signature(packed) != both.signature(plain)


def test_a_plan_for_one_base_on_the_other(make_bench: BaseContext) -> None:
    context = make_bench(methods="uniform:rank=2,base=nf4 uniform:rank=2")
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    with pytest.raises(AdapterError, match="base is full, planned nf4"):
        audit_as_built(adapted, plan)
    detach(adapted)


@pytest.mark.parametrize("base", ["wide_gpt2", "wide_llama"])
@pytest.mark.parametrize("variant", ["", ",dora=true"])
def test_exports_compute_what_was_trained(
    make_bench: BaseContext, tmp_path: Path, base: str, variant: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    context = make_bench(methods=f"three_band:rank=4,base=nf4{variant}", model=str(folder), seeds="0")
    run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    model, _, _ = load_adapter(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not hasattr(merged.config, "quantization_config")
    assert lora_layers(merged) == {}
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert "4 bit" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    if not variant:
        export_uniform(tmp_path / "adapter", tmp_path / "uniform")
        card = (tmp_path / "uniform" / "README.md").read_text(encoding="utf-8")
        assert "BitsAndBytesConfig" in card
        again, _, _ = load_adapter(tmp_path / "uniform")
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_without_bitsandbytes(
    options: dict[str, object], make_study: Callable[..., StudyConfig],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    changes = {**options, "methods": "uniform:rank=2,base=nf4", "seeds": "0"}
    result = CliRunner().invoke(main, ["study", *words_of(changes)])
    assert result.exit_code == 2
    assert "pip install 'adaptive-lora[qlora]'" in result.output
    assert not (tmp_path / "mlflow.db").exists()
    plan = CliRunner().invoke(
        main, ["plan", "--model", str(options["model"]), "--method", "uniform:base=nf4,rank=2", "--json"]
    )
    assert json.loads(plan.stdout)["base"] == "nf4"  # a plan needs no quantiser
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        StudyContext(make_study(methods="uniform:rank=2,base=nf4"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_only_the_base_in_use_is_on_the_gpu(make_bench: BaseContext) -> None:
    context = make_bench(methods="uniform:rank=2 uniform:rank=2,base=nf4", seeds="0")
    other = context.on_base("nf4")
    assert (context.base.model.device.type, other.base.model.device.type) == ("cpu", "cuda")
    assert context.on_base("full") is context
    assert (context.base.model.device.type, other.base.model.device.type) == ("cuda", "cpu")


def test_served_from_the_same_files(wide_gpt2: Path) -> None:
    first, second = (load_model(wide_gpt2, torch.float32, CAUSAL, NF4) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_widths_that_a_cpu_decodes_wrongly(make_bench: BaseContext, base_folder: Path) -> None:
    with pytest.raises(ModelError, match="takes 32 inputs: in 4 bit on a CPU required"):
        make_bench(methods="uniform:rank=2,base=nf4", model=str(base_folder))


@pytest.mark.long
def test_the_engine_changes_no_number(in_store: Callable[..., StudyConfig], wide_llama: Path, tmp_path: Path) -> None:
    """QLoRA and DoRA train alone among trials that train together on the weights as saved."""
    methods = (
        "uniform:rank=2 uniform:rank=2,base=nf4 uniform:rank=2,dora=true "
        "uniform:rank=1,lora_plus=4 linear_decay:rank=2,low_rank=1"
    )
    losses = []
    for engine in ("serial", "together"):
        config = in_store(methods=methods, model=str(wide_llama), engine=engine, study=engine)
        quiet(config)
        mine = [r for r in trials_in(tmp_path) if r.data.tags["study_id"].startswith(engine)]
        losses.append({r.data.tags["method"]: r.data.metrics["test/loss"] for r in mine})
        assert len(losses[-1]) == 5
    serial, together = losses
    assert serial == pytest.approx(together, abs=1e-5)
    for label in ("uniform-r2-nf4", "uniform-r2-dora"):
        assert serial[label] == together[label]
