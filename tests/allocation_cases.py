"""Sites and measurements that the tests of allocation share. No model is built."""

from __future__ import annotations

import random
from itertools import product

from adaptive_lora.allocation import ProfileSummary
from adaptive_lora.allocation.site import AdapterSite, Role

GPT2_BLOCK = (
    ("attn.c_attn", Role.QKV, 1, 3),
    ("attn.c_proj", Role.OUTPUT, 1, 1),
    ("mlp.c_fc", Role.UP, 1, 4),
    ("mlp.c_proj", Role.DOWN, 4, 1),
)


def gpt2_sites(layers: int, width: int) -> tuple[AdapterSite, ...]:
    """Return the sites of a GPT-2 without building it."""
    return tuple(
        AdapterSite(
            name=f"transformer.h.{layer}.{name}",
            layer=layer,
            role=role,
            in_features=inner * width,
            out_features=outer * width,
        )
        for layer, (name, role, inner, outer) in product(range(layers), GPT2_BLOCK)
    )


DIALOGPT_MEDIUM = gpt2_sites(24, 1024)
NEEDED: dict[str, dict[str, object]] = {"given": {"ranks": ["c_attn=8", "c_proj=8", "c_fc=8"]}}
"""Method -> options without which it does not go."""


def evidence(sites: tuple[AdapterSite, ...], seed: int = 0, noise: float = 0.1) -> ProfileSummary:
    """Return scores and spectra that differ by site, with spectra measured again four times."""
    draw = random.Random(seed)
    level = {site.name: draw.lognormvariate(0, 1) * site.parameters_per_rank for site in sites}
    decay = {site.name: draw.uniform(0.5, 2.0) for site in sites}

    def measured() -> dict[str, tuple[float, ...]]:
        return {
            name: tuple(
                sorted(
                    (level[name] * i ** -decay[name] * draw.lognormvariate(0, noise) for i in range(1, 49)),
                    reverse=True,
                )
            )
            for name in level
        }

    return ProfileSummary(
        metric="whitened_gradient", scores=level, spectra=measured(), replicates=tuple(measured() for _ in range(4))
    )
