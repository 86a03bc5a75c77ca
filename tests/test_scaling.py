"""Scaling policies: what rank does to the step size, and names and studies of version 0.1."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from allocation_cases import gpt2_sites
from click.testing import CliRunner

from adaptive_lora.allocation import MethodSpec, RankPlan, Scaling, allocate
from adaptive_lora.allocation.plan import revised
from adaptive_lora.cli import main
from adaptive_lora.config import current_label, load_study, study_from
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adalora.fit import attach_adalora, scale_of
from adaptive_lora.methods.adapters import attach
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial_context import TrialOnBase

BaseContext = Callable[..., StudyContext]
RANKS = (4, 8, 16, 32, 64)


def first_step_gain(rank: int, scaling: str, seed: int) -> float:
    """Return by how much one Adam step from B = 0 lowers a quadratic loss of a real PEFT model.

    The loss is half the squared distance of every site's update from a random target, which keeps
    all sites apart: the model is used for its attached layers alone. The rate is small, so that
    the loss falls in proportion to the step.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=2, vocab_size=64))
    sites = find_sites(model)
    plan = allocate(MethodSpec.parse(f"uniform:rank={rank}"), sites, scaling=scaling)
    adapted = attach(model, plan, seed=seed, dropout=0.0)
    layers = list(lora_layers(adapted).values())
    numbers = torch.Generator().manual_seed(seed)
    targets = [torch.randn(layer.out_features, layer.in_features, generator=numbers) for layer in layers]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-6)

    def loss() -> torch.Tensor:
        return sum(
            (
                0.5 * ((layer.get_delta_weight(ADAPTER).T - target) ** 2).mean()
                for layer, target in zip(layers, targets, strict=True)
            ),
            start=torch.zeros(()),
        )

    before = loss()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        # float64: the loss falls by less than float32 resolves beside its size
        updates = [layer.get_delta_weight(ADAPTER).T.double() for layer in layers]
        falls = [
            (target.double() * update - 0.5 * update**2).mean() for update, target in zip(updates, targets, strict=True)
        ]
    return float(sum(falls))


@pytest.mark.parametrize(
    ("scaling", "growth"),
    [
        ("standard", lambda rank: 1.0),
        ("rslora", lambda rank: (rank / RANKS[0]) ** 0.5),
        ("constant", lambda rank: rank / RANKS[0]),
    ],
)
def test_adams_first_step_against_rank(scaling: str, growth: Callable[[int], float]) -> None:
    """The claim that the default rests on: under `standard`, rank is not a learning rate."""
    gains = [sum(first_step_gain(rank, scaling, seed) for seed in range(4)) for rank in RANKS]
    for rank, gain in zip(RANKS, gains, strict=True):
        assert gain / gains[0] == pytest.approx(growth(rank), rel=0.10), rank


@pytest.mark.parametrize("scaling", list(Scaling))
@pytest.mark.parametrize("rank", RANKS)
def test_step_size_is_factor_times_rank(scaling: Scaling, rank: int) -> None:
    plan = allocate(MethodSpec.parse(f"uniform:rank={rank}"), gpt2_sites(2, 128), scaling=scaling)
    wanted = {"standard": 32.0, "rslora": 32 * rank**0.5, "constant": 2.0 * rank}[scaling]
    for entry in plan.entries:
        assert plan.step_size_of(entry) == pytest.approx(wanted)
        assert plan.scale_of(entry) * rank == pytest.approx(wanted)


def test_alpha_alone_scales_the_factor() -> None:
    """Alpha can so be a second axis of a grid, for one method or for the study."""
    sites = gpt2_sites(2, 32)
    for text, alpha in (("uniform:rank=4", 64.0), ("uniform:rank=4,alpha=64", 32.0)):
        plan = allocate(MethodSpec.parse(text), sites, alpha=alpha)
        assert {plan.scale_of(entry) for entry in plan.entries} == {16.0}
    assert MethodSpec.parse("uniform:rank=4,alpha=64").label == "uniform-r4-alpha64"


# --- what recipes do inside


def test_adalora_keeps_the_factor_of_its_start_rank(make_bench: BaseContext) -> None:
    context = make_bench(methods="adalora:rank=2", max_steps=10)
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    assert isinstance(plan, RankPlan)
    options = context.config.specs[0].options
    assert isinstance(options, AdaLora)
    start = options.start_plan(plan)
    assert start.trained_rank == 3
    adapted = attach_adalora(context.base.model, start, options, seed=0, dropout=0.0)
    for layer in lora_layers(adapted).values():
        assert scale_of(layer) == pytest.approx(32 / 3, rel=1e-4)
    final = revised(start, {name: 1 + at % 3 for at, name in enumerate(start.rank_pattern())})
    assert {final.step_size_of(entry) for entry in final.entries} == {32.0}
    constant = dataclasses.replace(allocate(context.config.specs[0], context.sites, scaling="constant"), trained_rank=3)
    assert [constant.step_size_of(e) for e in constant.entries] == pytest.approx([2.0 * 3] * len(context.sites))


@pytest.mark.parametrize(
    ("method", "trained"), [("truncate:rank=2", 4), ("truncate_retrain:rank=2", None), ("grow_prune:rank=3", None)]
)
def test_final_plans_say_at_which_rank_they_were_trained(
    make_bench: BaseContext, method: str, trained: int | None
) -> None:
    context = make_bench(methods=method, max_steps=6, lr="1e-3")
    job = TrialOnBase(context, next(context.config.trials()), lambda event: None)
    found = job.trial.method.options.fit(job)
    assert isinstance(found.plan, RankPlan)
    assert found.plan.trained_rank == trained
    assert found.plan.scaling is Scaling.STANDARD
    # one alpha for all: rank and step size stay apart, whatever the recipe did
    assert {found.plan.step_size_of(entry) for entry in found.plan.entries} == {32.0}
    assert RankPlan.from_dict(found.plan.to_dict()) == found.plan
    job.release()


@pytest.mark.parametrize("name", ["adalora", "grow_prune", "truncate", "truncate_retrain", "eva", "gora"])
def test_a_plan_says_what_its_method_does_with_the_factor(name: str, base_folder: object) -> None:
    words = ["plan", "--model", str(base_folder), "--method", f"{name}:rank=2"]
    if name == "gora":
        words[-1] += ",ranks=uniform"
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "factor" in " ".join(result.output.split("scaling", 1)[1].split())
    values = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert values["scaling_in_training"]


# --- names of version 0.1


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({"scale": "2", "scale_policy": "constant_alpha_over_r"}, (32.0, "constant")),
        ({"scale": 2.0, "scale_policy": "constant_alpha"}, (32.0, "standard")),
        ({"scale": 2.0, "scale_policy": "rslora"}, (8.0, "rslora")),
        ({"scale": 1.0}, (16.0, "standard")),
        ({"scale_policy": "constant_alpha_over_r"}, (32.0, "constant")),
        ({"scale_policy": "rslora"}, (8.0, "rslora")),
    ],
)
def test_earlier_names_are_read_with_a_warning(
    earlier: dict[str, object], now: tuple[float, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train = study_from(earlier).train
    assert (train.alpha, train.scaling) == now
    assert "is called" in caplog.text
    for rank in (2, 16):  # the same factors as then
        scale = float(str(earlier.get("scale", 2.0)))
        policy = earlier.get("scale_policy", "constant_alpha")
        then = {
            "constant_alpha_over_r": scale,
            "constant_alpha": scale * 16 / rank,
            "rslora": scale * (16 / rank) ** 0.5,
        }[str(policy)]
        scaling = Scaling(train.scaling)
        assert scaling.factor(scaling.alpha_at(train.alpha, rank), rank) == pytest.approx(then)


def test_earlier_options_work_on_the_command_line(base_folder: object) -> None:
    words = ["plan", "--model", str(base_folder), "--method", "uniform:rank=4", "--json"]
    earlier = CliRunner().invoke(main, [*words, "--scale-policy", "rslora", "--scale", "2"])
    now = CliRunner().invoke(main, [*words, "--scaling", "rslora", "--alpha", "8"])
    assert json.loads(earlier.stdout) == json.loads(now.stdout)
    assert "--scale-policy" not in CliRunner().invoke(main, ["plan", "--help"]).output


def test_the_command_line_overrides_a_file_under_either_name(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("scale: 4\nscale_policy: constant_alpha\n", encoding="utf-8")
    assert load_study(file, {}).train.alpha == 64
    train = load_study(file, {"alpha": "16", "scaling": "rslora"}).train
    assert (train.alpha, train.scaling) == (16.0, "rslora")
    file.write_text("alpha: 8\n", encoding="utf-8")
    assert load_study(file, {"scale": "4"}).train.alpha == 64


def test_a_renamed_method_option_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        study = study_from({"methods": "uniform:rank=1 uniform:rank=2,scaling=constant_alpha"})
        assert [spec.label for spec in study.specs] == ["uniform-r1", "uniform-r2-standard"]
    assert caplog.text.count("constant_alpha is called standard now") == 1


def test_a_methods_earlier_scaling_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = MethodSpec.parse("uniform:rank=4,scaling=constant_alpha_over_r")
    assert spec.scaling == "constant"
    assert "constant_alpha_over_r is called constant now" in caplog.text
    assert current_label("uniform-r4-constant_alpha_over_r@uniform-4") == ("uniform-r4-constant@uniform-4")
    assert current_label("uniform-r4-constant_alpha") == "uniform-r4-standard"
    assert current_label("uniform-r4-rslora") == "uniform-r4-rslora"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0}, "alpha must be above 0; got 0"),
        ({"alpha": -1}, "alpha must be above 0; got -1"),
        ({"scale": 0}, "alpha must be above 0; got 0"),
        ({"scale": "much"}, "alpha: expected a number, got 'much'"),
        ({"scale": True}, "alpha: expected a number, got True"),
        ({"alpha": 8, "scale": 2}, "scale is the earlier name of alpha"),
        ({"scaling": "constant", "scale_policy": "rslora"}, "scale_policy is the earlier name"),
        ({"scaling": "alpha_over_r"}, "scaling must be one of standard, rslora, constant"),
        ({"methods": "uniform:alpha=0"}, "alpha must be above 0; got 0"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_from(values)


def test_plans_of_version_0_1_are_read() -> None:
    plan = allocate(MethodSpec.parse("linear_decay:rank=8,low_rank=2"), gpt2_sites(3, 32), scaling="constant")
    values = plan.to_dict()
    for name in ("scaling", "trained_rank", "scaling_in_training"):
        del values[name]
    values["scale_policy"] = "constant_alpha_over_r"
    assert RankPlan.from_dict(values) == plan
