"""Learning rates of methods and of sites: their grids, groups, the schedule over them, and what they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import get_scheduler

from adaptive_lora.allocation import RankPlan
from adaptive_lora.config import study_from
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adapters import attach
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.run import run_study
from adaptive_lora.training import Trainer, TrainInputs
from adaptive_lora.training.trainer import parameter_groups

BaseContext = Callable[..., StudyContext]
FIRST, SECOND = "transformer.h.0.attn.c_attn", "transformer.h.2.mlp.c_proj"


def with_multipliers(plan: RankPlan, **factors: float) -> RankPlan:
    """Return the plan with other learning rates at the first and second site."""
    names = {FIRST: factors["first"], SECOND: factors["second"]}
    entries = tuple(dataclasses.replace(entry, lr_multiplier=names.get(entry.site.name, 1.0)) for entry in plan.entries)
    return dataclasses.replace(plan, entries=entries)


def test_groups_hold_every_parameter_once_and_the_schedule_scales_all(make_bench: BaseContext) -> None:
    context = make_bench()
    plan = with_multipliers(context.plan(context.config.specs[0], seed=0, fold=0), first=3, second=0.5)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    groups = parameter_groups(adapted, plan.lr_multipliers(), 0.1)
    trainable = [id(p) for p in adapted.parameters() if p.requires_grad]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trainable)
    layers = lora_layers(adapted)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, layer in layers.items():
        expected = 0.1 * {FIRST: 3, SECOND: 0.5}.get(name, 1)
        assert rate[id(layer.lora_A["default"].weight)] == pytest.approx(expected)
        assert rate[id(layer.lora_B["default"].weight)] == pytest.approx(expected)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    schedule = get_scheduler("linear", optimizer, 0, 4)
    shares = []
    for _ in range(4):
        optimizer.step()
        schedule.step()
        shares.append([group["lr"] / group["initial_lr"] for group in optimizer.param_groups])
    assert np.allclose(shares, [[share] * 3 for share in (0.75, 0.5, 0.25, 0.0)])


def test_a_method_has_rates_of_its_own(tmp_path: Path) -> None:
    words = {"max_examples": 40, "max_steps": 2, "seeds": "0", "lr": "1e-3 3e-3", "precision": "fp32"}
    methods = "uniform:rank=2 uniform:rank=1,lr=1e-2 linear_decay:rank=2,low_rank=1,lr=1e-4+3e-3"
    place = {"tracking_uri": f"sqlite:///{tmp_path / 'm.db'}", "output": str(tmp_path)}
    config = study_from({**words, **place, "methods": methods})
    result = run_study(config, Console(quiet=True)).study_result
    rates = {method.label: [rate.lr for rate in method.rates] for method in result.comparison.methods}
    assert rates == {"uniform-r2": [1e-3, 3e-3], "uniform-r1": [1e-2], "linear_decay-r2-1": [1e-4, 3e-3]}
    assert "different learning rates to choose from" in str(result.comparison.to_dict()["audit"])
    plain = study_from({**words, **place, "methods": methods.replace(",lr=1e-2", ""), "lr": "1e-2"})
    again = run_study(plain, Console(quiet=True)).study_result
    assert again.trials_run == 1  # of uniform-r2; the rate of uniform-r1 was its own before, and is that of all now


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "uniform:lr=0"}, "lr must be above 0"),
        ({"methods": "uniform:lr=fast"}, "expected a number"),
        ({"methods": "uniform:lr=1e-3+1e-3"}, "lr: a rate is given more than once"),
        ({"methods": "uniform:lr=1e-3", "lr": "1e-3 1e-2", "race": True}, "at least two learning rates"),
    ],
)
def test_rates_that_a_method_cannot_have(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_from({"validations": 3, **settings})


def test_a_race_goes_on_beside_a_method_with_one_rate(tmp_path: Path) -> None:
    settings = {
        "methods": "uniform:rank=2 uniform:rank=1,lr=1e-2", "lr": "1e-4 1e-2 3e-2", "race": True, "validations": 3,
        "max_examples": 40, "max_steps": 6, "seeds": "0 1", "precision": "fp32",
        "tracking_uri": f"sqlite:///{tmp_path / 'm.db'}", "output": str(tmp_path),
    }  # fmt: skip
    result = run_study(study_from(settings), Console(quiet=True)).study_result
    alone = result.comparison.method("uniform-r1")
    assert (alone.lr, alone.seeds) == (1e-2, (0, 1))
    assert result.comparison.method("uniform-r2").seeds == (0, 1)


def test_no_multiplier_is_one_group_in_the_models_order(make_bench: BaseContext) -> None:
    context = make_bench()
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    (group,) = parameter_groups(adapted, plan.lr_multipliers(), 0.1)
    assert [id(p) for p in group["params"]] == [id(p) for p in adapted.parameters() if p.requires_grad]


def test_a_multiplier_trains_like_another_rate(make_bench: BaseContext) -> None:
    """One step of AdamW from B = 0: B moves by the rate, so by multiplier times the rate."""
    context = make_bench(max_steps=1, warmup_share=0)
    plan = context.plan(context.config.specs[0], seed=0, fold=0)

    def trained_b(plan: RankPlan) -> dict[str, torch.Tensor]:
        adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
        inputs = TrainInputs(
            examples=context.splits(0).train,
            collate=context.task.collate,
            validate=lambda model: 0.0,
            lr_multipliers=plan.lr_multipliers(),
        )
        Trainer(adapted, inputs, context.config.train, context.runtime, lr=1e-3, seed=0).run()
        found = {name: layer.lora_B["default"].weight.detach().clone() for name, layer in lora_layers(adapted).items()}
        adapted.unload()
        return found

    plain, scaled = trained_b(plan), trained_b(with_multipliers(plan, first=3, second=0.5))
    for name, weight in plain.items():
        factor = {FIRST: 3, SECOND: 0.5}.get(name, 1)
        torch.testing.assert_close(scaled[name], factor * weight, rtol=1e-5, atol=1e-9)


def test_a_trial_trains_with_its_plans_multipliers(
    make_bench: BaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptive_lora.runner.trial import run_trial

    context = make_bench(methods="uniform:rank=2", seeds="0")
    trial = next(context.config.trials())
    plain = run_trial(context, trial, tmp_path / "plain")
    plan = with_multipliers(plain.plan, first=3, second=0.5)
    monkeypatch.setattr(context, "plan", lambda *args, **kwargs: plan)
    other = run_trial(context, trial, tmp_path / "other")
    assert other.train.losses[0] == plain.train.losses[0]
    assert other.train.losses[1:] != plain.train.losses[1:]
