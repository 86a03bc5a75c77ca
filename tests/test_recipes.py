"""Recipes: truncation is exact, plans are what was built, trials stay paired."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from allocation_cases import gpt2_sites
from architectures import GROUPED
from conftest import save_byte_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, RankPlan, Scaling, allocate, uniform_cost
from adaptive_lora.allocation.plan import revised
from adaptive_lora.allocation.site import ATTENTION_ROLES
from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.adapters.factors import Factors, spectrum
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import TrialOutcome, run_trial

BaseContext = Callable[..., StudyContext]


def run(context: StudyContext, folder: Path) -> list[TrialOutcome]:
    """Run every trial of a workbench's study."""
    return [run_trial(context, trial, folder / trial.label) for trial in context.config.trials()]


def one(context: StudyContext, folder: Path) -> TrialOutcome:
    """Run the first trial of a workbench's study."""
    trial: TrialSpec = next(context.config.trials())
    return run_trial(context, trial, folder / trial.label)


# --- truncation


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_cut_equals_the_dense_svd_in_float64(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(a=torch.randn(5, 11, generator=generator), b=torch.randn(7, 5, generator=generator))
    found = spectrum(factors, scale=2.0)
    dense = 2.0 * factors.b.double() @ factors.a.double()
    u, s, vt = torch.linalg.svd(dense)
    torch.testing.assert_close(found.values, s[:5], rtol=1e-12, atol=1e-12)
    cut = found.cut(rank, scale=0.5)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    torch.testing.assert_close(0.5 * cut.b.double() @ cut.a.double(), best, rtol=1e-6, atol=1e-6)


def test_spectrum_of_a_site_that_never_moved_is_zero() -> None:
    found = spectrum(Factors(a=torch.randn(3, 8), b=torch.zeros(6, 3)), scale=2.0)
    assert found.values.tolist() == [0.0] * 3


def test_truncate_cuts_what_uniform_trained(make_bench: BaseContext, tmp_path: Path, base_folder: Path) -> None:
    """Training is that of uniform at the start's rank; only the end differs."""
    context = make_bench(methods="uniform:rank=4 truncate:rank=2", seeds="0")
    uniform, truncated = run(context, tmp_path)
    assert truncated.train.losses == uniform.train.losses
    assert truncated.training_parameters == uniform.plan.trainable_parameters
    budget = truncated.plan.budget
    assert budget == uniform.plan.trainable_parameters // 2
    most = max(site.parameters_per_rank for site in context.sites)
    assert budget - most < truncated.plan.trainable_parameters <= budget
    assert 0 < truncated.extra["truncation/kept_energy"] < 1
    assert truncated.extra["truncation/uncut_validation_loss"] == uniform.train.validation_loss
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    cut = PeftModel.from_pretrained(base, str(truncated.folder)).eval()
    final = context.losses(cut, context.splits(0).validation).loss
    assert truncated.train.validation_loss == final != uniform.train.validation_loss
    assert truncated.train.validation_curve[-1][1] == final
    assert truncated.history[0].ranks == uniform.plan.rank_pattern()
    left = {name: rank for name, rank in truncated.history[1].ranks.items() if rank}
    assert left == truncated.plan.rank_pattern()
    assert lora_layers(context.base.model) == {}


@pytest.mark.parametrize("policy", list(Scaling))
def test_revised_plans_are_what_allocation_would_make(policy: Scaling) -> None:
    sites = gpt2_sites(2, 32)
    small, large = (
        allocate(MethodSpec.parse(f"uniform:rank={rank}"), sites, alpha=11.2, scaling=policy) for rank in (3, 5)
    )
    found = revised(small, dict.fromkeys(small.rank_pattern(), 5))
    for entry, wanted in zip(found.entries, large.entries, strict=True):
        assert entry.rank == wanted.rank
        assert found.scale_of(entry) == pytest.approx(large.scale_of(wanted), rel=1e-12)
    gone = sites[0].name
    less = revised(small, small.rank_pattern() | {gone: 0})
    assert less.left_out == (gone,)
    assert RankPlan.from_dict(less.to_dict()) == less


@pytest.mark.parametrize("policy", list(Scaling))
def test_truncating_nothing_away_changes_nothing(make_bench: BaseContext, tmp_path: Path, policy: Scaling) -> None:
    """A budget one below the start's leaves out one component; the loss hardly moves."""
    context = make_bench(methods="uniform:rank=3", seeds="0", scaling=policy)
    uniform = one(context, tmp_path)
    budget = uniform.plan.trainable_parameters - 1
    method = f"truncate:start_rank=3,budget={budget}"
    context = make_bench(methods=method, seeds="0", scaling=policy)
    truncated = one(context, tmp_path)
    assert truncated.extra["truncation/kept_energy"] > 0.99
    assert truncated.test.loss == pytest.approx(uniform.test.loss, rel=1e-2)


def test_retraining_starts_from_the_seeds_own_weights(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="uniform:rank=2 truncate:rank=2 truncate_retrain:rank=2", seeds="0")
    uniform, truncated, retrained = run(context, tmp_path)
    assert retrained.plan.rank_pattern() == truncated.plan.rank_pattern()
    assert retrained.train.losses[0] == uniform.train.losses[0]  # B is zero again
    assert retrained.train.losses != uniform.train.losses
    assert retrained.search_seconds > 0


def test_steps_of_two_trainings_are_shown_as_one_course(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="truncate_retrain:rank=1", seeds="0", max_steps=2)
    seen = []
    run_trial(
        context, next(context.config.trials()), tmp_path / "adapter",
        lambda event: seen.append((event.step, event.total_steps)),
    )  # fmt: skip
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("name", ["truncate", "truncate_retrain"])
def test_a_start_within_the_budget_is_refused_before_training(make_bench: BaseContext, name: str) -> None:
    with pytest.raises(AllocationError, match="nothing would be cut"):
        make_bench(methods=f"{name}:rank=4,start_rank=4")


# --- all recipes

ALL = (
    "uniform:rank=2 adalora:rank=2 grow_prune:rank=2,interval=2,move_share=0.5 truncate:rank=2 "
    "truncate_retrain:rank=2 eva:rank=2 gora:rank=2"
)


@pytest.mark.parametrize("patience", [0, 1])
def test_recipes_under_bf16_checkpointing_and_early_stopping(
    make_bench: BaseContext, tmp_path: Path, patience: int
) -> None:
    context = make_bench(
        methods=ALL, seeds="0", precision="bf16", gradient_checkpointing="true", dropout=0.1,
        max_steps=12, epochs=9, validations=6, patience=patience, lr="3e-2",
    )  # fmt: skip
    outcomes = run(context, tmp_path)
    assert {outcome.train.precision for outcome in outcomes} == {"bf16"}
    weights = [load_file(outcome.folder / "adapter_model.safetensors") for outcome in outcomes]
    assert all(w.dtype == torch.float32 for each in weights for w in each.values())
    for outcome in outcomes[1:5]:
        assert outcome.plan.budget is not None
        assert outcome.plan.trainable_parameters <= outcome.plan.budget
    settle = AdaLora().phases(12).settle  # before it, weights above the budget are no candidates
    for outcome, first in ((outcomes[0], 1), (outcomes[1], settle), (outcomes[2], settle)):
        curve = [loss for step, loss in outcome.train.validation_curve if step >= first]
        assert outcome.train.validation_loss == (min(curve) if patience else curve[-1])
    assert lora_layers(context.base.model) == {}


def test_same_seed_same_adapter_other_seed_another(make_bench: BaseContext, tmp_path: Path) -> None:
    settings = {"methods": ALL, "max_steps": 6, "epochs": 9, "dropout": 0.1}
    both = run(make_bench(**settings, seeds="0 1"), tmp_path / "both")
    again = run(make_bench(**settings, seeds="0"), tmp_path / "again")
    first, second = both[: len(again)], both[len(again) :]
    for one_run, other in zip(first, again, strict=True):
        assert one_run.test.nll_E.tolist() == other.test.nll_E.tolist()
        assert one_run.plan == other.plan
    for one_run, other in zip(first, second, strict=True):
        assert one_run.plan.method == other.plan.method
        assert one_run.test.nll_E.tolist() != other.test.nll_E.tolist()


def test_recipes_change_no_other_trial(make_bench: BaseContext, tmp_path: Path) -> None:
    alone = make_bench(methods="uniform:rank=2", seeds="0", dropout=0.1)
    among = make_bench(methods=" ".join([*ALL.split()[1:], "uniform:rank=2"]), seeds="0", dropout=0.1)
    expected = one(alone, tmp_path / "alone")
    last = run(among, tmp_path / "among")[-1]
    assert last.train.losses == expected.train.losses
    assert last.test.nll_E.tolist() == expected.test.nll_E.tolist()


def test_recipes_on_a_model_of_linear_maps_that_share_inputs(make_bench: BaseContext, tmp_path: Path) -> None:
    """Llama: q, k and v see one input, as do gate and up; k and v are narrower."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_byte_tokenizer(tmp_path / "llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {**GROUPED, "vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256}
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(tmp_path / "llama")
    context = make_bench(methods=ALL, seeds="0", max_steps=6, epochs=9, model=str(tmp_path / "llama"))
    outcomes = run(context, tmp_path)
    eva = next(o.plan.rank_pattern() for o in outcomes if o.plan.method == "eva-r2")
    for start in (0, 7):  # equal inputs, equal scores: ranks differ only where a tie is cut
        shared = [eva.get(site.name, 0) for site in context.sites[start : start + 3]]
        assert max(shared) - min(shared) <= 1
    for outcome in outcomes:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(outcome.folder)).eval()
        again = context.losses(loaded, context.splits(0).test)
        assert again.nll_E.tolist() == outcome.test.nll_E.tolist()


LIMITED = "max_rank=4,multiple=2,attention_cap=2"


@pytest.mark.parametrize(
    "name", ["truncate:rank=2", "truncate_retrain:rank=2", "eva:rank=2", "nuclear_retrain:rank=2,rounds=1"]
)
@pytest.mark.parametrize("budget", ["", ",budget=uniform-2"])
def test_ranks_of_a_threshold_hold_limits(make_bench: BaseContext, tmp_path: Path, name: str, budget: str) -> None:
    context = make_bench(methods=f"{name},{LIMITED}{budget}", seeds="0", profile_batches=4)
    outcome = one(context, tmp_path)
    for entry in outcome.plan.entries:
        most = 2 if entry.site.role in ATTENTION_ROLES else 4
        assert entry.rank % 2 == 0
        assert 2 <= entry.rank <= most
    if budget:
        assert outcome.plan.trainable_parameters <= uniform_cost(context.sites, 2)


@pytest.mark.parametrize("name", ["truncate:rank=2", "eva:rank=2,budget=uniform-2"])
def test_a_least_rank_leaves_no_site_out(make_bench: BaseContext, tmp_path: Path, name: str) -> None:
    context = make_bench(methods=f"{name},min_rank=1", seeds="0", profile_batches=4)
    outcome = one(context, tmp_path)
    assert not outcome.plan.left_out
    assert min(entry.rank for entry in outcome.plan.entries) >= 1


def test_a_least_rank_above_the_start_is_refused(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="truncate:rank=2,start_rank=3,min_rank=4", seeds="0")
    with pytest.raises(AllocationError, match="min_rank 4 is above the 3 components"):
        one(context, tmp_path)
