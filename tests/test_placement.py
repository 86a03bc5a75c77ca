"""Selective placement: part of the block, roles, layers and names; the earlier study's counts."""

from __future__ import annotations

import json

import pytest
from allocation_cases import DIALOGPT_MEDIUM
from click.testing import CliRunner

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.cli import main
from adaptive_lora.errors import ConfigError, ModelError

LLAMA = tuple(
    AdapterSite(name=f"model.layers.{layer}.{name}", layer=layer, role=role, in_features=8, out_features=8)
    for layer in range(5)
    for name, role in (
        ("self_attn.q_proj", Role.QUERY),
        ("self_attn.k_proj", Role.KEY),
        ("self_attn.v_proj", Role.VALUE),
        ("mlp.down_proj", Role.DOWN),
    )
)
TWO_TOWERS = tuple(
    AdapterSite(
        name=f"{tower}.{layer}.fc1", layer=layer, role=Role.UP, in_features=8, out_features=8,
        tower=tower,
    )
    for tower, depth in (("text", 4), ("vision", 2))
    for layer in range(depth)
)  # fmt: skip


def planned(options: str, sites: tuple[AdapterSite, ...] = DIALOGPT_MEDIUM) -> RankPlan:
    """Plan uniform rank 16, or what the smallest site takes, on chosen sites."""
    rank = min(16, *(site.max_rank for site in sites))
    return allocate(MethodSpec.parse(f"uniform:rank={rank},{options}"), sites)


def layers_of(plan: RankPlan, tower: str = "") -> list[int]:
    return sorted({entry.site.layer for entry in plan.entries if entry.site.tower == tower})


@pytest.mark.parametrize(
    ("options", "parameters", "fewer"),
    [
        # Selective LoRA chose by name: c_proj stands in attention and in the feed-forward part.
        ("target_names=c_attn+c_proj", 4_325_376, 31.25),
        ("target_names=c_fc", 1_966_080, 68.75),
        ("placement=attention", 2_359_296, 62.5),
        ("placement=feed_forward", 3_932_160, 37.5),
        ("roles=qkv+output+down", 4_325_376, 31.25),  # what those names stand for
        ("roles=up", 1_966_080, 68.75),
        ("layers=0-11", 3_145_728, 50.0),
        ("layers=last-half", 3_145_728, 50.0),
        ("roles=qkv,layers=0+23", 131_072, 97.92),
    ],
)
def test_counts_on_dialogpt_medium(options: str, parameters: int, fewer: float) -> None:
    plan = planned(options)
    assert plan.trainable_parameters == parameters
    assert 100 * (1 - parameters / 6_291_456) == pytest.approx(fewer, abs=0.005)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("0", [0]),
        ("1-3", [1, 2, 3]),
        ("0+3-4", [0, 3, 4]),
        ("first-half", [0, 1, 2]),
        ("last-half", [3, 4]),
        ("first-third", [0, 1]),
        ("middle-third", [2, 3]),
        ("last-third", [4]),
    ],
)
def test_layers(layers: str, expected: list[int]) -> None:
    assert layers_of(planned(f"layers={layers}", LLAMA)) == expected


def test_layers_are_counted_in_each_tower() -> None:
    plan = planned("layers=last-half", TWO_TOWERS)
    assert (layers_of(plan, "text"), layers_of(plan, "vision")) == ([2, 3], [1])
    plan = planned("layers=3", TWO_TOWERS)
    assert (layers_of(plan, "text"), layers_of(plan, "vision")) == ([3], [])


def test_roles_of_separate_maps() -> None:
    plan = planned("roles=query+value,layers=last-third", LLAMA)
    assert [entry.site.name for entry in plan.entries] == [
        "model.layers.4.self_attn.q_proj", "model.layers.4.self_attn.v_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("roles=query+value", r"one linear layer, c_attn, computes queries.*required role qkv"),
        ("roles=gate", "unknown role of this base 'gate'.*Known: down, output, qkv, up"),
        ("layers=0-24", r"layers=0-24 goes beyond the last layer: required within 0 to 23"),
        ("placement=attention,roles=up", "no site left: placement 'attention' with roles up"),
    ],
)
def test_a_choice_that_the_base_does_not_have(options: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(options)


@pytest.mark.parametrize("layers", ["half", "3-1", "-1", "1-", "first half"])
def test_layers_that_cannot_be_read(layers: str) -> None:
    with pytest.raises(ConfigError, match="layers must be numbers from 0, ranges such as 0-11"):
        MethodSpec.build("uniform", {"layers": [layers]})


def test_a_choice_is_part_of_label_and_identity() -> None:
    spec = MethodSpec.parse("uniform:rank=4,roles=query+value,layers=0-2+last-third")
    assert spec.label == "uniform-r4-query-value-layers0-2+last-third"
    values = spec.to_dict()
    assert (values["roles"], values["layers"]) == (["query", "value"], ["0-2", "last-third"])
    name = values.pop("name")
    assert MethodSpec.build(name, values) == spec
    assert not {"roles", "layers"} & set(MethodSpec.parse("uniform").to_dict())


def test_plan_on_the_command_line() -> None:
    words = ["plan", "--model", "embedded", "--method", "uniform:rank=4", "--json"]
    found = CliRunner().invoke(main, [*words, "--roles", "qkv,up", "--layers", "first-third+5"])
    sites = json.loads(found.stdout)["sites"]
    assert {site["role"] for site in sites} == {"qkv", "up"}
    assert sorted({site["layer"] for site in sites}) == [0, 1, 5]
