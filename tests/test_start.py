"""Initial weights and a frozen A under any allocation: as papers and PEFT define them, on an unchanged base."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from tracked import quiet, trials_in
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate, uniform_cost
from adaptive_lora.allocation.start import Start
from adaptive_lora.config import study_from
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.methods.importance.gradient import weight_of
from adaptive_lora.methods.start import begin, initial_factors
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.plan import plan_method
from adaptive_lora.runner.schedule import Leg, grouped
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.runner.trial_context import TrialOnBase
from adaptive_lora.serving import load_adapter

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)
MIXED = "linear_decay:rank=6,low_rank=2,multiple=2"
STARTS = ("pissa", "olora", "corda", "lora_ga", "orthogonal", "eva")
packed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


# --- options


def test_starts_stand_in_label_and_identity_only_where_used() -> None:
    assert not {"init", "lora_fa"} & set(MethodSpec.parse("uniform:rank=8").to_dict())
    spec = MethodSpec.parse("uniform:rank=8,init=pissa,lora_fa=true")
    assert spec.label == "uniform-r8-pissa-fa"
    values = spec.to_dict()
    assert MethodSpec.build(values.pop("name"), values) == spec
    assert MethodSpec.parse("eva:init=default").to_dict()["init"] == "default"  # eva's and gora's own option


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:init=pisa", "got 'pisa'; did you mean 'pissa'"),
        ("adalora:init=pissa", "adalora starts and trains by a rule of its own"),
        ("grow_prune:init=olora", "leave init out"),
        ("truncate:lora_fa=true", "truncate cannot have lora_fa: it changes A"),
        ("prompt_tuning:init=pissa", "gives no ranks, so it takes no init"),
        ("ia3:lora_fa=true", "gives no ranks, so it takes no lora_fa"),
        ("eva:init=pissa", "init must be one of own, default"),
        ("uniform:init=loftq", "required base=nf4, got base=full"),
        ("uniform:init=pissa,base=nf4", "PiSSA decomposes the weights as saved"),
        ("uniform:init=lora_ga,base=nf4", "init=lora_ga does not go with base=nf4"),
        ("uniform:lora_fa=true,lora_plus=16", "lora_fa trains no A"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodSpec.parse(text)


def test_ranks_that_a_start_lacks_are_refused(make_bench: BaseContext) -> None:
    sites = make_bench().sites
    with pytest.raises(AllocationError, match="must be even; got 3 at"):
        allocate(MethodSpec.parse("uniform:rank=3,init=orthogonal"), sites)
    with pytest.raises(AllocationError, match=r"required at most 16 at .* got 17"):
        allocate(MethodSpec.parse("uniform:rank=17,init=lora_ga"), sites)


# --- factors


def begun(context: StudyContext) -> tuple[TrialOnBase, Mapping[str, Any]]:
    """Return the first trial, and its initial factors."""
    trial = TrialOnBase(context, next(context.config.trials()), lambda event: None)
    return trial, initial_factors(trial)


def of_peft(context: StudyContext, plan: RankPlan, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return PEFT's model of a plan on a copy of the base, and what it took out of each weight."""
    base = AutoModelForCausalLM.from_pretrained(context.config.model.model, dtype=torch.float32).eval()
    names = [entry.site.name for entry in plan.entries]
    before = {name: base.get_submodule(name).weight.detach().clone() for name in names}
    prepare = settings.pop("prepare", lambda base, config: None)
    config = LoraConfig(
        r=1, lora_alpha=32, target_modules=names, rank_pattern=plan.rank_pattern(),
        init_lora_weights=str(plan.init), **settings,
    )  # fmt: skip
    prepare(base, config)
    adapted = get_peft_model(base, config)
    layers = lora_layers(adapted)
    return adapted, {name: before[name] - layers[name].get_base_layer().weight for name in names}


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_what_is_taken_out_of_weights_is_what_peft_takes(
    make_bench: BaseContext, llama_folder: Path, start: str
) -> None:
    context = make_bench(methods=f"{MIXED},init={start}", model=str(llama_folder), seeds="0")
    trial, pairs = begun(context)
    assert len(set(trial.plan.rank_pattern().values())) > 1

    def prepare(base: Any, config: LoraConfig) -> None:
        def one_by_one() -> None:
            for batch in trial.calibration():
                for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                    base(input_ids=ids[mask.bool()][None])

        preprocess_corda(base, config, one_by_one)

    settings = {"corda_config": CordaConfig(), "prepare": prepare} if start == "corda" else {}
    adapted, taken = of_peft(context, trial.plan, **settings)
    for entry in trial.plan.entries:
        a, b = pairs[entry.site.name]
        ours = trial.plan.scale_of(entry) * b @ a
        close = {"rtol": 1e-2, "atol": 1e-3} if start == "corda" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours, taken[entry.site.name], **close)
        theirs = lora_layers(adapted)[entry.site.name]
        torch.testing.assert_close(a.norm(), theirs.lora_A[ADAPTER].weight.norm(), rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(b.norm(), theirs.lora_B[ADAPTER].weight.norm(), rtol=1e-2, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_lora_ga_takes_the_directions_that_peft_takes(make_bench: BaseContext, llama_folder: Path) -> None:
    context = make_bench(methods=f"{MIXED},init=lora_ga", model=str(llama_folder), seeds="0")
    trial, pairs = begun(context)

    def prepare(base: Any, config: LoraConfig) -> None:
        def step() -> None:
            for batch in trial.calibration():
                context.loss(base, batch).backward()

        preprocess_loraga(base, config, step)

    adapted, _ = of_peft(context, trial.plan, lora_ga_config=LoraGAConfig(), prepare=prepare)
    for entry in trial.plan.entries:
        layer, (a, b) = lora_layers(adapted)[entry.site.name], pairs[entry.site.name]
        factor = entry.site.out_features**0.25 / 4  # sqrt of gamma 16
        torch.testing.assert_close(a @ a.T, factor**2 * torch.eye(entry.rank), rtol=0, atol=1e-4)
        torch.testing.assert_close(b.T @ b, factor**2 * torch.eye(entry.rank), rtol=0, atol=1e-4)
        theirs = layer.lora_A[ADAPTER].weight  # orthonormal rows of the same space
        torch.testing.assert_close(a.T @ a / factor**2, theirs.T @ theirs, rtol=0, atol=0.05)


def test_orthogonal_factors_have_no_product(make_bench: BaseContext) -> None:
    context = make_bench(methods=f"{MIXED},init=orthogonal", seeds="0 1")
    _, pairs = begun(context)
    _, again = begun(context)
    for name, (a, b) in pairs.items():
        assert torch.equal(a, again[name][0])
        assert a.norm() > 0.1 < b.norm()
        assert (b @ a).abs().max() < 1e-6 * a.norm() * b.norm()
    other = TrialOnBase(context, list(context.config.trials())[1], lambda event: None)
    assert not torch.equal(next(iter(pairs.values()))[0], next(iter(initial_factors(other).values()))[0])


# --- training


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
@pytest.mark.parametrize("start", STARTS)
def test_it_starts_as_the_base_and_is_saved_as_plain_lora_on_it(
    make_bench: BaseContext, tmp_path: Path, start: str, base: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    context = make_bench(methods=f"{MIXED},init={start}", model=str(folder), seeds="0", weight_decay=0.1, lr="1e-2")
    before = {name: tensor.clone() for name, tensor in context.base.model.state_dict().items()}
    with torch.no_grad():
        logits = context.base.model(IDS).logits
    trial, pairs = begun(context)
    adapted = trial.attach(trial.plan)
    begin(adapted, trial.plan, pairs)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    trial.release()
    outcome = run_trial(context, trial.trial, tmp_path / "adapter")
    after = context.base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # bit for bit
    assert outcome.search_seconds > 0
    assert outcome.plan.trainable_parameters == sum(entry.parameters for entry in outcome.plan.entries)
    model, _, _ = load_adapter(outcome.folder)
    assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()
    config = json.loads((outcome.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["init_lora_weights"] is True
    factor = 2 if Start(start).is_subtracted else 1
    for entry in outcome.plan.entries:
        layer = lora_layers(model)[entry.site.name]
        assert layer.r[ADAPTER] == factor * entry.rank
        assert layer.scaling[ADAPTER] == pytest.approx(outcome.plan.scale_of(entry), rel=1e-12)
        if factor == 2:  # what was taken out did not change in training, but for the rest
            a, b = pairs[entry.site.name]
            assert torch.equal(layer.lora_A[ADAPTER].weight[entry.rank :], a)
            assert torch.equal(layer.lora_B[ADAPTER].weight[:, entry.rank :], -b)
            assert not torch.equal(layer.lora_A[ADAPTER].weight[: entry.rank], a)
            assert not torch.equal(layer.lora_B[ADAPTER].weight[:, : entry.rank], b)
    assert RankPlan.from_dict(json.loads((outcome.folder / "rank_plan.json").read_text())) == outcome.plan


@pytest.mark.parametrize(
    "method",
    [
        "uniform:rank=2,init=pissa,dora=true,scaling=rslora,lora_plus=4",
        "linear_decay:rank=4,low_rank=1,init=olora,scaling=rslora",
        "waterfill:rank=2,min_rank=0,init=corda,dora=true",
        "random:of=empirical,rank=2,init=lora_ga,scaling=constant",
        "lr_only:of=empirical,rank=2,init=eva",
        "uniform:rank=2,init=pissa,lora_fa=true,dora=true",
        "eva:rank=2,lora_fa=true",
        "gora:rank=2,lora_fa=true",
        "waterfill:rank=2,init=pissa,alora=###,scaling=rslora,lora_plus=4",
        "gora:rank=2,lora_fa=true,alora=###",
    ],
)
def test_starts_go_with_allocations_and_variants(make_bench: BaseContext, tmp_path: Path, method: str) -> None:
    context = make_bench(methods=method, seeds="0", max_steps=8, profile_batches=2, dropout=0.1)
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    model, _, _ = load_adapter(outcome.folder)
    assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()
    assert outcome.test.loss < context.base_scores(0).loss
    assert outcome.plan.dora == ("dora" in method)


@packed
def test_loftq_starts_nearer_to_the_weights_as_saved(make_bench: BaseContext, wide: Path, tmp_path: Path) -> None:
    context = make_bench(methods="linear_decay:rank=8,low_rank=2,init=loftq,base=nf4", model=str(wide), seeds="0")
    full = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    trial, pairs = begun(context)
    adapted = trial.attach(trial.plan)
    for name, layer in lora_layers(adapted).items():
        weight, start = full.get_submodule(name).weight, weight_of(layer.get_base_layer())
        a, b = pairs[name]
        left = weight - start - layer.scaling[ADAPTER] * b @ a
        values = torch.linalg.svdvals(weight - start)
        torch.testing.assert_close(torch.linalg.svdvals(left)[0], values[len(a)], rtol=1e-3, atol=1e-6)
    trial.release()
    outcome = run_trial(context, trial.trial, tmp_path / "adapter")
    model, _, _ = load_adapter(outcome.folder)
    assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()
    assert lora_layers(model).keys() == pairs.keys()
    assert all(layer.r[ADAPTER] == len(pairs[name][0]) for name, layer in lora_layers(model).items())


@packed
@pytest.mark.parametrize("option", ["init=olora", "init=orthogonal", "init=eva", "lora_fa=true", "alora=###"])
def test_starts_on_a_base_in_4_bit(make_bench: BaseContext, wide: Path, tmp_path: Path, option: str) -> None:
    context = make_bench(methods=f"uniform:rank=4,{option},base=nf4", model=str(wide), seeds="0")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    model, _, _ = load_adapter(outcome.folder)
    assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 64, the least that bitsandbytes decodes rightly on a CPU."""
    return save_llama(tmp_path_factory.mktemp("wide"), width=64)


def test_every_engine_runs_them_alone_with_equal_numbers(in_store: Callable[..., Any], tmp_path: Path) -> None:
    methods = "uniform:rank=2 uniform:rank=2,init=pissa uniform:rank=2,lora_fa=true uniform:rank=2,init=olora"
    losses = []
    for engine in ("serial", "together"):
        config = in_store(methods=methods, engine=engine, study=engine)
        quiet(config)
        mine = [run for run in trials_in(tmp_path) if run.data.tags["study_id"].startswith(engine)]
        losses.append({run.data.tags["method"]: run.data.metrics["test/loss"] for run in mine})
    assert len(set(losses[0].values())) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    legs = [Leg(trial=trial) for trial in config.trials()]
    assert [len(group) for group in grouped(legs, 4)] == [1, 1, 1, 1]


# --- LoRA-FA


def test_a_budget_of_lora_fa_counts_b_alone(make_bench: BaseContext) -> None:
    sites = make_bench().sites
    plain = allocate(MethodSpec.parse("uniform:rank=8"), sites)
    same_rank = allocate(MethodSpec.parse("uniform:rank=8,lora_fa=true"), sites)
    assert same_rank.rank_pattern() == plain.rank_pattern()
    assert same_rank.trainable_parameters == 8 * sum(site.out_features for site in sites)
    budget = uniform_cost(sites, 8)
    same_budget = allocate(MethodSpec.parse("uniform:lora_fa=true,budget=uniform-8"), sites)
    assert same_budget.budget == budget == plain.trainable_parameters
    assert 0 <= budget - same_budget.trainable_parameters < max(site.out_features for site in sites)
    assert min(same_budget.rank_pattern().values()) > 8
    assert "count B alone" in " ".join(same_budget.notes)
    assert RankPlan.from_dict(same_budget.to_dict()) == same_budget


def test_lora_fa_trains_b_alone(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="linear_decay:rank=4,low_rank=1,lora_fa=true", seeds="0", weight_decay=0.1)
    trial = TrialOnBase(context, next(context.config.trials()), lambda event: None)
    adapted = trial.attach(trial.plan)
    start = {name: layer.lora_A[ADAPTER].weight.clone() for name, layer in lora_layers(adapted).items()}
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == trial.plan.trainable_parameters
    trial.release()
    outcome = run_trial(context, trial.trial, tmp_path / "adapter")
    model, _, _ = load_adapter(outcome.folder)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A[ADAPTER].weight, start[name])
        assert layer.lora_B[ADAPTER].weight.any()
    assert (context.losses(model, context.splits(0).test).nll_E == outcome.test.nll_E).all()


# --- what becomes of it


def test_the_adapter_is_exported_as_any_other(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="three_band:rank=4,init=pissa", seeds="0")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    most = max(outcome.plan.rank_pattern().values())
    assert export_uniform(tmp_path / "adapter", tmp_path / "uniform") == 8 >= 2 * most
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"A server must allow rank {2 * most}" in card
    model, _, _ = load_adapter(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_plans_are_emitted_with_pefts_own_start(llama_folder: Path, start: str) -> None:
    config = study_from({"model": str(llama_folder), "methods": f"{MIXED},init={start}"})
    report = plan_method(config, config.specs[0])
    emitted = report.emit("peft")
    written = json.loads(emitted.text)
    assert written["init_lora_weights"] == start
    assert written["r"] in report.plan.rank_pattern().values()
    says = " ".join(emitted.caveats)
    prepared = {"corda": "preprocess_corda", "eva": "initialize_lora_eva_weights", "lora_ga": "preprocess_loraga"}
    assert prepared.get(start, "") in says
    assert ("path_initial_model_for_weight_conversion" in says) == (start in ("pissa", "olora"))
    assert f"init={start}" in " ".join(report.emit("unsloth").caveats)
    invoked = plan_method(config, MethodSpec.parse("uniform:rank=2,lora_fa=true,alora=<|assistant|>"))
    says = " ".join(invoked.emit("peft").caveats)
    assert "token ids of '<|assistant|>'" in says
    assert "set requires_grad of every lora_A to false" in says
    with pytest.raises(ConfigError, match=f"start of init={start} depends on the base's weights"):
        report.emit("axolotl", adapter="new")


# --- aLoRA


def test_an_activated_adapter_acts_from_its_invocation_on(make_bench: BaseContext, tmp_path: Path) -> None:
    method = f"{MIXED},alora=### Response"
    context = make_bench(methods=[method], seeds="0", generate="on")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert outcome.test.loss < context.base_scores(0).loss
    model, tokenizer, _ = load_adapter(outcome.folder)
    assert context.score(model, context.splits(0).test).overall == outcome.test.overall
    ids = torch.tensor([tokenizer("first ### Response: then")["input_ids"]])
    at = len(tokenizer("first ")["input_ids"])
    with torch.no_grad():
        base, adapted = context.base.model(ids).logits, model(input_ids=ids).logits
        assert torch.equal(adapted[:, :at], base[:, :at])
        assert (adapted[:, at:] != base[:, at:]).any(dim=-1).all()
        plain = ids[:, :at]
        assert torch.equal(model(input_ids=plain).logits, context.base.model(plain).logits)
    with pytest.raises(AdapterError, match="acts from its invocation tokens on alone"):
        export_merged(outcome.folder, tmp_path / "merged")
    with pytest.raises(AdapterError, match=r"alora_invocation_tokens=.*serve the adapter as it is"):
        export_uniform(outcome.folder, tmp_path / "uniform")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("uniform:alora=not there", "prompts, such as .* lack the tokens"),
        ("uniform:alora=x,dora=true", "PEFT has no DoRA layers"),
        ("uniform:alora=x,experts=true", "no layers of routed experts that act on some tokens"),
        ("adalora:alora=x", "adalora cannot have alora"),
        ("ia3:alora=x", "so it takes no alora"),
    ],
)
def test_invocations_that_cannot_act_are_refused(make_bench: BaseContext, method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_bench(methods=[method], seeds="0")


def test_activated_adapters_are_not_trained_with_gradient_checkpointing(make_bench: BaseContext) -> None:
    with pytest.raises(ConfigError, match="alora does not go with gradient_checkpointing"):
        make_bench(methods="uniform:rank=2,alora=###", seeds="0", gradient_checkpointing=True)
