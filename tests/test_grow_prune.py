"""Grow and prune: the budget holds at every step, moments survive, the function does not jump."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.allocation.plan import revised
from adaptive_lora.methods.adapters import attach
from adaptive_lora.methods.adapters.attach import ADAPTER, initial_a, lora_layers
from adaptive_lora.methods.grow_prune import GrowPrune
from adaptive_lora.methods.grow_prune.fit import GrowPruneCallback, SiteView, decide_moves
from adaptive_lora.methods.grow_prune.resize import NewRank, resize
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.training import Trainer, TrainInputs

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)


def view(scores: list[float | None], cost: int = 1, max_rank: int = 9) -> SiteView:
    """Return a site with these component scores."""
    return SiteView(scores=tuple(scores), cost=cost, max_rank=max_rank)


def test_the_weakest_goes_to_where_the_weakest_is_strongest() -> None:
    sites = [view([5.0, 0.1]), view([4.0, 3.0]), view([9.0, 1.0])]
    changes = decide_moves(sites, slack=0, limit=1)
    assert [(c.pruned, c.grown) for c in changes] == [([1], 0), ([], 1), ([], 0)]


def test_equal_sites_keep_their_ranks() -> None:
    changes = decide_moves([view([2.0, 1.0])] * 4, slack=0, limit=9)
    assert not any(c.pruned or c.grown for c in changes)


def test_a_dear_rank_takes_several_cheap_ones_or_none() -> None:
    cheap = view([5.0, 0.2, 0.1], cost=2)
    dear = view([8.0], cost=4)
    assert decide_moves([cheap, dear], slack=0, limit=1)[0].pruned == [2, 1]
    assert decide_moves([view([5.0, 4.9, 0.1], cost=2), dear], slack=0, limit=1)[0].pruned == []


def test_the_young_are_neither_judged_nor_asked() -> None:
    sites = [view([0.1, None]), view([9.0, 8.0]), view([None, None, None])]
    changes = decide_moves(sites, slack=0, limit=3)
    assert [(c.pruned, c.grown) for c in changes] == [([0], 0), ([], 1), ([], 0)]


SITES = st.lists(
    st.builds(
        lambda scores, cost, room: view(scores, cost, len(scores) + room),
        st.lists(st.none() | st.floats(0, 100), min_size=1, max_size=6),
        st.integers(1, 7),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=7,
)


@given(SITES, st.integers(0, 20), st.integers(1, 5), st.booleans())
def test_moves_stay_within_budget_and_bounds(sites: list[SiteView], slack: int, limit: int, fill: bool) -> None:
    changes = decide_moves(sites, slack=slack, limit=limit, fill=fill)
    ranks = [len(site.scores) - len(change.pruned) + change.grown for site, change in zip(sites, changes, strict=True)]
    gained = sum((rank - len(site.scores)) * site.cost for rank, site in zip(ranks, sites, strict=True))
    assert gained <= slack
    assert all(1 <= rank <= site.max_rank for rank, site in zip(ranks, sites, strict=True))
    for site, change in zip(sites, changes, strict=True):
        assert len(set(change.pruned)) == len(change.pruned)
        assert all(site.scores[component] is not None for component in change.pruned)
    if fill:
        open_sites = [s.cost for s, rank in zip(sites, ranks, strict=True) if rank < s.max_rank]
        assert not open_sites or slack - gained < min(open_sites)
    else:
        assert sum(change.grown for change in changes) <= limit


# --- resizing


@pytest.mark.parametrize("policy", ["standard", "rslora", "constant"])
def test_survivors_keep_moments_and_growth_does_not_change_the_function(make_bench: BaseContext, policy: str) -> None:
    context = make_bench(methods="grow_prune:rank=3", scaling=policy)
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    before = adapted(IDS).logits.detach()
    name = context.sites[2].name
    layer, entry = lora_layers(adapted)[name], plan.entries[2]
    old = {
        part: {k: v.clone() for k, v in optimizer.state[weight].items()}
        for part, weight in (("A", layer.lora_A[ADAPTER].weight), ("B", layer.lora_B[ADAPTER].weight))
    }
    grown = revised(plan, plan.rank_pattern() | {name: 5}).entries[2]
    rows = initial_a(0, name, 5, entry.site.in_features)[3:]
    scale = plan.scale_of(grown)
    factor = plan.scale_of(entry) / scale
    resize(layer, NewRank(kept=[0, 1, 2], new_a=rows, alpha=grown.alpha, scale=scale), optimizer)
    torch.testing.assert_close(adapted(IDS).logits, before, rtol=1e-5, atol=1e-5)
    a, b = (optimizer.state[part[ADAPTER].weight] for part in (layer.lora_A, layer.lora_B))
    assert torch.equal(a["exp_avg"][:3], old["A"]["exp_avg"])
    assert torch.equal(a["exp_avg_sq"][:3], old["A"]["exp_avg_sq"])
    assert torch.equal(b["exp_avg"][:, :3], old["B"]["exp_avg"] / factor)
    assert not a["exp_avg"][3:].any()
    assert not b["exp_avg"][:, 3:].any()
    torch.testing.assert_close(b["exp_avg_sq"][:, 4], b["exp_avg_sq"][:, :3].mean(dim=1))
    assert float(a["step"]) == float(b["step"]) == 3
    assert torch.equal(layer.lora_A[ADAPTER].weight[3:], rows)
    resize(layer, NewRank(kept=[4, 0], new_a=rows[:0], alpha=grown.alpha, scale=scale), optimizer)
    assert torch.equal(optimizer.state[layer.lora_A[ADAPTER].weight]["exp_avg"][1], old["A"]["exp_avg"][0])
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in adapted.parameters() if p.requires_grad)
    adapted.unload()


# --- trials

OPTIONS = "grow_prune:rank=3,interval=3,move_share=0.3"


@pytest.fixture
def context(make_bench: BaseContext) -> StudyContext:
    """Thirty steps with dropout of both kinds."""
    return make_bench(methods=OPTIONS, max_steps=30, epochs=9, dropout=0.1, validations=2, seeds="0")


def test_trial_moves_ranks_and_never_exceeds_the_budget(context: StudyContext, tmp_path: Path) -> None:
    trial, seen = next(context.config.trials()), []

    def count(event: object) -> None:
        seen.append(sum(p.numel() for p in context.base.model.parameters() if p.requires_grad))

    outcome = run_trial(context, trial, tmp_path / "adapter", count)
    budget = outcome.plan.budget
    assert budget is not None
    assert len(seen) == 30
    assert max(seen) <= budget
    assert outcome.training_parameters == max(seen)
    assert len(outcome.history) > 1
    assert outcome.history[-1].ranks == outcome.plan.rank_pattern()
    assert set(outcome.plan.rank_pattern().values()) != {3}
    dearest = max(site.parameters_per_rank for site in context.sites)
    assert budget - dearest < outcome.plan.trainable_parameters
    phases = GrowPrune(interval=3).phases(30)
    assert all(phases.due(event.step) for event in outcome.history[1:])
    again = run_trial(context, trial, tmp_path / "again")
    assert again.test.nll_E.tolist() == outcome.test.nll_E.tolist()
    assert again.history == outcome.history
    assert lora_layers(context.base.model) == {}


def test_before_the_first_move_it_is_uniform(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods=f"uniform:rank=3 {OPTIONS}", max_steps=30, epochs=9, seeds="0")
    uniform, moved = (run_trial(context, t, tmp_path / t.label) for t in context.config.trials())
    first = moved.history[1].step
    assert moved.train.losses[:first] == uniform.train.losses[:first]
    assert moved.train.losses != uniform.train.losses


@pytest.mark.parametrize("stop", [2, 12, 25])
def test_interrupted_and_resumed_is_the_uninterrupted_run(context: StudyContext, stop: int) -> None:
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    options, parts = context.config.specs[0].options, context.splits(0)
    kept: dict[str, Any] = {}

    def keep(step: int, take: Callable[[], Any]) -> None:
        if step == stop and not kept:
            kept["snapshot"] = take()
            raise KeyboardInterrupt

    def trainer(**more: Any) -> tuple[Any, GrowPruneCallback, dict[str, torch.Tensor]]:
        adapted = attach(context.base.model, plan, seed=0, dropout=0.1)
        try:
            callback = GrowPruneCallback(adapted, plan, options, seed=0)  # type: ignore[arg-type]
            inputs = TrainInputs(
                examples=parts.train,
                collate=context.task.collate,
                validate=lambda model: context.losses(model, parts.validation).loss,
                callback=callback,
                **more,
            )
            result = Trainer(adapted, inputs, context.config.train, context.runtime, lr=1e-2, seed=0).run()
            weights = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
        finally:
            adapted.unload()
        return result, callback, weights

    whole, callback, expected = trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer(on_snapshot=keep)
    result, resumed, found = trainer(resume=kept["snapshot"])
    assert result.losses == whole.losses
    assert resumed.history == callback.history
    assert len(callback.history) > 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
