"""Methods that give no ranks: what is trained is what was planned, and it comes back as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, RankPlan, TunerPlan, read_plan
from adaptive_lora.cli.planted import PlantedStudies
from adaptive_lora.config import ModelConfig, study_from
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError
from adaptive_lora.methods.adapters.audit import audit_tuner, audit_tuner_moved, trained_tensors
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.models.base import skeleton
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.plan import plan_method
from adaptive_lora.runner.trial import PROBE, TrialOutcome, probe_logits, run_trial
from adaptive_lora.runner.trial_context import TrialOnBase
from adaptive_lora.serving import load_adapter
from adaptive_lora.serving.custom_tuner import AdaptedModel

BaseContext = Callable[..., StudyContext]

EVERYWHERE = (
    "prompt_tuning:tokens=3",
    "prefix_tuning:tokens=3",
    "p_tuning:tokens=3,encoder_width=5",
    "ia3",
    "houlsby:width=3",
    "pfeiffer:reduction=8",
    "full",
    "ln_tuning",
    "head_only",
)
ON_GPT2 = (*EVERYWHERE, "bitfit")
ON_LLAMA = EVERYWHERE


@pytest.fixture
def folders(base_folder: Path, llama_folder: Path) -> dict[str, Path]:
    """The bases by name."""
    return {"gpt2": base_folder, "llama": llama_folder}


CASES = [*(("gpt2", method) for method in ON_GPT2), *(("llama", method) for method in ON_LLAMA)]
OTHERWISE = ("prefix_tuning:tokens=3", "ia3", "houlsby:width=3")
"""Methods that are built on Llama otherwise than on GPT-2: grouped heads, gates, two norms before a block's parts."""
every_case = pytest.mark.parametrize(("base", "method"), CASES)


def states(context: StudyContext) -> dict[str, torch.Tensor]:
    """Return a copy of everything in the base."""
    return {name: tensor.clone() for name, tensor in context.base.model.state_dict().items()}


def one(context: StudyContext, folder: Path) -> TrialOutcome:
    """Run the first trial."""
    return run_trial(context, next(context.config.trials()), folder)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        case if case[0] == "gpt2" or case[1] in OTHERWISE else pytest.param(*case, marks=pytest.mark.long)
        for case in CASES
    ],
)
def test_a_trial_leaves_the_base_and_reloads_exactly(
    base: str, method: str, folders: dict[str, Path], make_bench: BaseContext, tmp_path: Path
) -> None:
    context = make_bench(methods=method, seeds="0", model=str(folders[base]), max_steps=4)
    before, flags = states(context), [p.requires_grad for p in context.base.model.parameters()]
    logits = probe_logits(context, context.base.model, 0)
    outcome = one(context, tmp_path / "adapter")
    after = context.base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [p.requires_grad for p in context.base.model.parameters()] == flags
    assert torch.equal(probe_logits(context, context.base.model, 0), logits)
    assert isinstance(outcome.plan, TunerPlan)
    assert outcome.training_parameters == outcome.plan.trainable_parameters
    model, _, _ = load_adapter(tmp_path / "adapter")
    again = context.losses(model, context.splits(0).test)
    assert again.nll_E.tolist() == outcome.test.nll_E.tolist()
    saved = load_file(tmp_path / "adapter" / PROBE)["logits"]
    assert torch.equal(probe_logits(context, model, 0), saved)
    assert not torch.equal(saved, logits)
    first = outcome.train.losses[0]
    assert (first == pytest.approx(_first_loss(context), rel=1e-5)) == (not outcome.plan.positions)


def _first_loss(context: StudyContext) -> float:
    """Return the first training loss of LoRA: that of the base, with its own dropout."""
    trial = next(context.config.trials())
    spec = MethodSpec.parse("uniform:rank=1")
    job = TrialOnBase(context, dataclasses.replace(trial, method=spec), lambda event: None)
    try:
        return RankMethod.fit(job.method.options, job).result.losses[0]
    finally:
        job.release()


@every_case
def test_the_plan_without_weights_is_what_is_built(
    base: str, method: str, folders: dict[str, Path], make_bench: BaseContext
) -> None:
    spec = MethodSpec.parse(method)
    report = plan_method(study_from({"model": str(folders[base])}), spec)
    context = make_bench(methods=method, model=str(folders[base]))
    plan = context.plan(spec, seed=0, fold=0)
    assert report.plan == plan
    assert isinstance(plan, TunerPlan)
    assert read_plan(plan.to_dict()) == plan
    total = sum(p.numel() for p in skeleton(ModelConfig(model=str(folders[base]))).parameters())
    assert report.reduction_vs_full == 1 - plan.trainable_parameters / total


def test_full_fine_tuning_trains_everything_once(base_folder: Path, make_bench: BaseContext) -> None:
    context = make_bench(methods="full")
    plan = context.plan(MethodSpec.parse("full"), seed=0, fold=0)
    assert plan.trainable_parameters == context.base.total_parameters
    assert plan.budget is None
    with pytest.raises(AllocationError, match=r"full@10 trains [\d,]+ parameters, above"):
        context.plan(MethodSpec.parse("full:budget=10"), seed=0, fold=0)


def test_full_fine_tuning_holds_the_base_beside_its_copy(base_folder: Path, make_bench: BaseContext) -> None:
    """The base in its own type and a float32 copy that is trained: nothing else of that size."""
    plan = make_bench().plan(MethodSpec.parse("full"), seed=0, fold=0)
    assert isinstance(plan, TunerPlan)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    places = {parameter.data_ptr() for parameter in model.parameters()}
    adapted = AdaptedModel(model.requires_grad_(False), trained=list(plan.tensors))
    start = adapted.start_state()
    assert {tensor.data_ptr() for tensor in start.values()} == places
    assert sum(tensor.nbytes for tensor in start.values()) == 2 * plan.trainable_parameters
    assert sum(p.nbytes for p in adapted.parameters()) == 4 * plan.trainable_parameters
    adapted.release()
    assert {parameter.data_ptr() for parameter in model.parameters()} == places


def test_bitfit_needs_biases(llama_folder: Path, make_bench: BaseContext) -> None:
    with pytest.raises(AllocationError, match="LlamaForCausalLM has no bias terms"):
        make_bench(methods="bitfit", model=str(llama_folder))


def test_bitfit_below_its_budget_says_so(make_bench: BaseContext) -> None:
    plan = make_bench().plan(MethodSpec.parse("bitfit:budget=uniform-8"), seed=0, fold=0)
    assert isinstance(plan, TunerPlan)
    assert plan.trainable_parameters < (plan.budget or 0)
    assert "has no size parameter" in plan.notes[0]


def test_options_about_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="bitfit gives no ranks, so it takes no max_rank"):
        MethodSpec.parse("bitfit:max_rank=4,placement=attention")


def test_what_compares_ranks_takes_no_family() -> None:
    with pytest.raises(ConfigError, match="unknown method 'bitfit'"):
        MethodSpec.parse("random:of=bitfit")
    with pytest.raises(ConfigError, match="'houlsby:width=2' gives no ranks"):
        PlantedStudies(methods=("houlsby:width=2",))


def test_read_plan_tells_families_from_ranks(make_bench: BaseContext) -> None:
    context = make_bench()
    ranks = context.plan(MethodSpec.parse("uniform:rank=2"), seed=0, fold=0)
    assert isinstance(ranks, RankPlan)
    assert read_plan(ranks.to_dict()) == ranks
    values = context.plan(MethodSpec.parse("bitfit"), seed=0, fold=0).to_dict()
    with pytest.raises(AllocationError, match="contradicts itself"):
        read_plan({**values, "trainable_parameters": 1})


def test_the_audit_sees_every_difference(make_bench: BaseContext) -> None:
    context = make_bench(methods="bitfit")
    job = TrialOnBase(context, next(context.config.trials()), lambda event: None)
    plan = job.tuner_plan
    model = context.base.model
    with pytest.raises(AdapterError, match="is not trainable"):
        audit_tuner(model, plan.tensors)
    wte = model.get_parameter("transformer.wte.weight")
    wte.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"wte\.weight is not planned"):
        audit_tuner(model, {})
    with pytest.raises(AdapterError, match="shape is"):
        audit_tuner(model, {"transformer.wte.weight": (3, 3)})
    start = {name: p.detach().clone() for name, p in trained_tensors(model).items()}
    with pytest.raises(AdapterError, match="did not move 1 tensors"):
        audit_tuner_moved(model, start)
    wte.requires_grad_(False)
