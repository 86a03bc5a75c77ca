"""Every type of adapter of PEFT: counted, trained, saved, reloaded, and removed from the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, PeftModel, PeftType, get_peft_model
from peft_matrix import COLUMNS, CONVERTED, NO_CONV1D, OFF_THE_BASE, UNMERGED, refused, spec_of, table, works
from safetensors.torch import load_file
from task_bases import run_and_prove
from task_studies import study_of
from torch import nn
from transformers import AutoModelForCausalLM

import adaptive_lora as al
from adaptive_lora.allocation import MethodSpec, TunerPlan, make_plan
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.config import study_from
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.methods.peft_types.table import REFUSED, TYPES
from adaptive_lora.models.sites.find import read_architecture
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, run_trial
from adaptive_lora.serving import load_adapter

PAGE = Path(__file__).resolve().parents[1] / "docs" / "peft_types.md"
MakeBench = Callable[..., StudyContext]


def architecture_of(folder: Path) -> Architecture:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return read_architecture(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))


def plan_of(text: str, base: Architecture) -> TunerPlan:
    plan = make_plan(MethodSpec.parse(text), base)
    assert isinstance(plan, TunerPlan)
    return plan


def test_every_type_is_supported_or_has_a_reason() -> None:
    assert TYPES.keys() | REFUSED.keys() == {kind.value for kind in PeftType}
    assert not TYPES.keys() & REFUSED.keys()


@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled",
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor to 1",
    "ignore:Detected that the base layer has no bias term",
)
@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_trained_saved_and_removed(
    kind: str, make_bench: MakeBench, llama_folder: Path, tmp_path: Path
) -> None:
    context = make_bench(methods=spec_of(kind), seeds="0", model=str(llama_folder), max_steps=3, lr="1e-2")
    before = {name: tensor.clone() for name, tensor in context.base.model.state_dict().items()}
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    after = context.base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert outcome.plan.trainable_parameters > 0
    assert (outcome.extra["start_difference"] > 1e-5) == (kind in OFF_THE_BASE)
    model, _, _ = load_adapter(tmp_path / "adapter")
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].peft_type == kind
    again = context.task.probe(model, context.splits(0).test)
    assert torch.equal(again, load_file(tmp_path / "adapter" / PROBE)["logits"])


@pytest.mark.parametrize("kind", [kind for kind, facts in TYPES.items() if facts.pattern])
def test_a_method_allocates_the_parameters_of_a_type(
    kind: str, make_bench: MakeBench, llama_folder: Path, tmp_path: Path
) -> None:
    """Early sites get more than late ones, and the saved adapter has these sizes."""
    method = f"peft:type={kind},of=linear_decay,rank=8,low_rank=2,target_names=q_proj+o_proj"
    if kind == "LOKR":  # which has few parameters at full rank already
        method = f"peft:type={kind},of=linear_decay,rank=3,low_rank=1,decompose_factor=2"
    context = make_bench(methods=method, seeds="0", model=str(llama_folder), max_steps=3, lr="1e-2")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    plan = outcome.plan
    assert isinstance(plan, TunerPlan)
    assert plan.budget is not None
    assert abs(plan.trainable_parameters / plan.budget - 1) <= 0.02
    early, late = (
        sum(torch.Size(shape).numel() for name, shape in plan.tensors.items() if f"layers.{layer}." in name)
        for layer in (0, 1)
    )
    assert early > 1.5 * late
    model, _, _ = load_adapter(tmp_path / "adapter")
    again = context.task.probe(model, context.splits(0).test)
    assert torch.equal(again, load_file(tmp_path / "adapter" / PROBE)["logits"])


UNMET = {
    *((kind, budget) for kind in ("BOFT", "C3A", "LILY", "LOKR", "OFT", "OSF", "PSOFT", "RANDLORA")
      for budget in ("uniform-2", "uniform-8")),
    ("VBLORA", "uniform-2"), ("FOURIERFT", "uniform-8"), ("ROAD", "uniform-8"), ("WAVEFT", "uniform-8"),
}  # fmt: skip
"""Types of coarse sizes, or that have fewer parameters than the budget at full size."""


@pytest.mark.parametrize("budget", ["uniform-2", "uniform-8"])
@pytest.mark.parametrize("kind", sorted(TYPES.keys() - {"BEFT"}))
def test_the_size_nearest_to_a_budget_is_found(kind: str, budget: str, llama_folder: Path) -> None:
    """No neighbour of it comes nearer; a budget that no size meets is refused with the nearest."""
    base = architecture_of(llama_folder)
    further = ",group_size=8" if kind == "ROAD" else ""
    wanted = int(budget.removeprefix("uniform-")) * sum(site.parameters_per_rank for site in base.sites)
    specification = f"peft:type={kind},budget={budget}{further}"
    if (kind, budget) in UNMET:
        with pytest.raises(
            AllocationError, match=rf"trains {wanted:,} parameters \(the budget\) within 2%; the nearest"
        ):
            plan_of(specification, base)
        return
    plan = plan_of(specification, base)
    size = plan.settings["options"][TYPES[kind].size]
    assert abs(plan.trainable_parameters - wanted) <= 0.02 * wanted
    if not isinstance(size, int) or TYPES[kind].values != "whole":
        return
    step = 2 if kind == "GRALORA" else 1
    for other in (size - step, size + step):
        try:
            near = plan_of(f"peft:type={kind},{TYPES[kind].size}={other}", base)
        except AllocationError:
            continue
        assert abs(near.trainable_parameters - wanted) >= abs(plan.trainable_parameters - wanted)


WRONG = {
    "peft:type=HIRO": "type must be one of BEFT, BOFT, ",
    "peft:type=hira": "got 'hira'; did you mean 'HIRA'?",
    "peft:type=LORA": "every method with ranks trains it",
    "peft:type=XLORA": "it mixes adapters that are trained before",
    "peft:type=VERA,of=waterfill": "has one size at all sites",
    "peft:type=DELORA,of=waterfill,r=4": "r is set per site by of=waterfill",
    "peft:type=DELORA,of=uniformly": "unknown method 'uniformly'; did you mean 'uniform'?",
    "peft:type=DELORA,min_rank=2": "takes no min_rank",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_specifications(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        MethodSpec.parse(text)
    assert WRONG[text] in str(error.value)


UNPLANNED = {
    "peft:type=OFT,oft_block=8": "unknown option of OFT 'oft_block'; did you mean 'oft_block_size'?",
    "peft:type=OFT,coft=perhaps": "option coft of OFT: expected true or false",
    "peft:type=HIRA,target_modules=q_proj": "target_modules of HIRA follows from the plan",
    "peft:type=DELORA,rank_pattern=3": "rank_pattern of DELORA follows from the plan, or does not hold one value",
    "peft:type=HIRA,hira_dropout=-1": "hira_dropout of HIRA: required a probability of at least 0 and",
    "peft:type=FOURIERFT,n_frequency=9999": "the product is 1024. Take another type",
    "peft:type=HIRA,budget=10": "the nearest is 1,024 (r=1). Give it as the budget",
    "peft:type=DEFT,decomposition_method=svd": "expected one of relu, qr, got 'svd'",
    "peft:type=C3A,block_size=7": "PEFT does not build this on LlamaForCausalLM: The block size should be a factor",
    "peft:type=DELORA,r=3,budget=uniform-2": "r=3 trains 3,",
    "peft:type=VBLORA,num_vectors=4,topk=5,vector_length=16": "num_vectors=4 is below topk=5, with which PEFT does not",
    "peft:type=VBLORA,num_vectors=1,vector_length=16": "num_vectors=1 is below topk=2",
}


@pytest.mark.parametrize("text", UNPLANNED)
def test_what_pefts_configuration_does_not_take(text: str, llama_folder: Path) -> None:
    with pytest.raises((AllocationError, ConfigError)) as error:
        plan_of(text, architecture_of(llama_folder))
    assert UNPLANNED[text] in str(error.value)


def test_a_plan_says_by_how_much_it_is_above_its_budget(llama_folder: Path) -> None:
    """DELORA trains a number beside A and B at each of 14 sites."""
    report = al.plan(AutoModelForCausalLM.from_pretrained(llama_folder), "peft:type=DELORA,budget=uniform-4")
    assert "4,096, exceeded by 14" in str(report)


def test_a_plan_says_where_an_adapter_has_more_parameters_than_the_weight(llama_folder: Path) -> None:
    base = architecture_of(llama_folder)
    (note,) = plan_of("peft:type=HIRA,r=400", base).notes
    first = base.sites[0]
    number, rows, columns = 400 * (first.in_features + first.out_features), first.out_features, first.in_features
    assert f"at 14 of 14 sites, such as {first.name} ({number:,} for {rows} x {columns}): take a smaller size" in note
    for text in ("peft:type=HIRA,r=8", "peft:type=LILY,r=2", "peft:type=VERA,r=400"):  # LILY shares tensors
        assert plan_of(text, base).notes == ()


@pytest.mark.parametrize("kind", TYPES)
def test_types_that_do_not_take_a_layer_are_refused_in_the_plan(kind: str, base_folder: Path) -> None:
    base = architecture_of(base_folder)
    if kind not in NO_CONV1D:
        assert plan_of(spec_of(kind), base).trainable_parameters > 0
        return
    with pytest.raises(AllocationError, match="PEFT does not build this on GPT2LMHeadModel: "):
        plan_of(spec_of(kind), base)


def test_a_specification_is_read_back() -> None:
    spec = MethodSpec.parse("peft:type=DELORA,of=linear_decay,rank=8,low_rank=2,budget=5000,delora_lambda=12")
    values = spec.to_dict()
    assert values["delora_lambda"] == "12"
    assert MethodSpec.build(values.pop("name"), values) == spec
    assert spec.label == "peft-linear_decay-DELORA-r8-2-delora_lambda12@5000"


def test_hira_ignores_ranks_per_site() -> None:
    """The reason why `of` does not take it; when this fails, it can."""
    model = nn.Sequential()
    for name in "ab":
        model.add_module(name, nn.Linear(8, 8))
    adapted = get_peft_model(model, HiraConfig(r=4, target_modules=["a", "b"], rank_pattern={"a": 2}))
    assert {p.shape[0] for name, p in adapted.named_parameters() if "hira_A" in name} == {4}


QUICK = {"BEFT", "FOURIERFT", "LILY", "LOKR", "MISS", "OFT"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.long) for kind in TYPES]
)
def test_exports(kind: str, make_bench: MakeBench, llama_folder: Path, tmp_path: Path) -> None:
    """Converted and merged adapters compute what the trained one does; others are refused by name."""
    context = make_bench(methods=spec_of(kind), seeds="0", model=str(llama_folder), max_steps=3, lr="1e-2")
    run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    examples = context.splits(0).test
    model, _, _ = load_adapter(tmp_path / "adapter")
    wanted = context.task.probe(model, examples)
    if kind in CONVERTED:
        export_uniform(tmp_path / "adapter", tmp_path / "uniform")
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "uniform"))
        torch.testing.assert_close(context.task.probe(loaded, examples), wanted, rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(AdapterError, match=f"PEFT has no conversion of {kind} to LoRA"):
            export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    if kind in UNMERGED:
        with pytest.raises(AdapterError, match="cannot be merged"):
            export_merged(tmp_path / "adapter", tmp_path / "merged")
        return
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(context.task.probe(merged, examples), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("column", COLUMNS)
def test_every_type_on_every_task(column: str, own_store: str, llama_folder: Path, tmp_path: Path) -> None:
    """Planned, trained, registered, loaded back and equal."""
    specs = [spec_of(kind) for kind in TYPES if works(kind, column)]
    options = study_of("causal" if column == "llama" else column, tmp_path)
    options |= {"model": str(llama_folder)} if column == "llama" else {}
    proven = run_and_prove(study_from({**options, "methods": specs, "tracking_uri": own_store}))
    assert {record.method for record in proven.records} == {MethodSpec.parse(spec).label for spec in specs}


def test_the_lists_in_the_docs() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page
    assert refused() in page
