"""How long allocation takes: `python tests/bench/allocation_speed.py` prints JSON.

Sites have the shapes of a Llama-3 block with grouped-query attention (8B), in as many layers as
make up the number of sites, or costs without a common divisor; spectra decay as a power law with
noise. Seconds are the best of several runs. `plan` is timed once, after its imports.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from adaptive_lora.allocation import METHODS, MethodSpec, ProfileSummary, RankPlan, allocate
from adaptive_lora.allocation.site import AdapterSite, Role

LLAMA_8B_BLOCK = (
    ("self_attn.q_proj", Role.QUERY, 4096, 4096),
    ("self_attn.k_proj", Role.KEY, 4096, 1024),
    ("self_attn.v_proj", Role.VALUE, 4096, 1024),
    ("self_attn.o_proj", Role.OUTPUT, 4096, 4096),
    ("mlp.gate_proj", Role.GATE, 4096, 14336),
    ("mlp.up_proj", Role.UP, 4096, 14336),
    ("mlp.down_proj", Role.DOWN, 14336, 4096),
)


def sites_of(count: int, *, odd: bool) -> tuple[AdapterSite, ...]:
    """Return so many sites; odd ones have widths that share no divisor."""
    draw = random.Random(0)
    made = []
    for index in range(count):
        name, role, inner, outer = LLAMA_8B_BLOCK[index % len(LLAMA_8B_BLOCK)]
        shift = draw.randrange(97) if odd else 0
        made.append(
            AdapterSite(
                name=f"model.layers.{index // len(LLAMA_8B_BLOCK)}.{name}",
                layer=index // len(LLAMA_8B_BLOCK),
                role=role,
                in_features=inner + shift,
                out_features=outer,
            )
        )
    return tuple(made)


def evidence_of(sites: tuple[AdapterSite, ...], length: int, replicates: int) -> ProfileSummary:
    """Return noisy power-law spectra of this length, measured again so many times."""
    draw = random.Random(1)
    level = {site.name: draw.lognormvariate(0, 1) * site.parameters_per_rank for site in sites}
    decay = {site.name: draw.uniform(0.5, 2.0) for site in sites}

    def spectrum(name: str) -> tuple[float, ...]:
        values = (level[name] * rank ** -decay[name] * draw.lognormvariate(0, 0.1) for rank in range(1, length + 1))
        return tuple(sorted(values, reverse=True))

    measured = [{name: spectrum(name) for name in level} for _ in range(replicates + 1)]
    return ProfileSummary(metric="whitened_gradient", scores=level, spectra=measured[0], replicates=tuple(measured[1:]))


def timed(work: Callable[[], RankPlan], runs: int) -> tuple[float, RankPlan]:
    """Return the shortest time of several runs, and the plan."""
    best, plan = float("inf"), None
    for _ in range(runs):
        started = time.perf_counter()
        plan = work()
        best = min(best, time.perf_counter() - started)
    assert plan is not None
    return best, plan


def measure(count: int, runs: int) -> dict[str, Any]:
    """Return seconds per method on so many sites, and what waterfill proved."""
    found: dict[str, Any] = {"sites": count, "seconds": {}, "waterfill": {}}
    sites = sites_of(count, odd=False)
    alone = evidence_of(sites, 64, 0)
    for name, kind in METHODS.items():
        if kind.ranks_in_training or not kind.gives_ranks:
            continue
        spec = MethodSpec.build(name, {"budget": "uniform-16"})
        seconds, _ = timed(lambda s=spec: allocate(s, sites, profile=alone), runs)
        found["seconds"][name] = round(seconds, 4)
    for label, odd, replicates in (
        ("shared divisor", False, 0),
        ("shared divisor, 2 halves", False, 2),
        ("no common divisor", True, 0),
    ):
        these = sites_of(count, odd=odd)
        known = evidence_of(these, 64, replicates)
        spec = MethodSpec.parse("waterfill:rank=16")
        seconds, plan = timed(lambda s=these, e=known, m=spec: allocate(m, s, profile=e), runs)
        proof = plan.certificate
        assert proof is not None
        found["waterfill"][label] = {
            "seconds": round(seconds, 4),
            "optimal": proof.optimal,
            "gap": proof.gap / proof.bound,
            "headroom": proof.headroom,
            "unused_parameters": (plan.budget or 0) - plan.trainable_parameters,
        }
    return found


def measure_plan() -> dict[str, Any]:
    """Return the seconds of `plan` for the architecture of Llama-3-70B, without weights."""
    from transformers import LlamaConfig

    from adaptive_lora.config import study_from
    from adaptive_lora.runner.plan import plan_method

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        started = time.perf_counter()
        report = plan_method(study_from({"model": folder}), MethodSpec.parse("linear_decay:budget=uniform-16"))
        seconds = time.perf_counter() - started
    return {"sites": len(report.sites), "parameters": report.total_parameters, "seconds": round(seconds, 2)}


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    found = {**measure(options.sites, options.runs), "plan of Llama-3-70B": measure_plan()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
