"""Made-up trials with known effects, for the tests of comparison and report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_lora.results import EvalResult, TrialRecord

WIDTH, LAYERS = 128, 6
SITES = (
    ("attn.c_attn", "qkv", WIDTH, 3 * WIDTH),
    ("attn.c_proj", "output", WIDTH, WIDTH),
    ("mlp.c_fc", "up", WIDTH, 4 * WIDTH),
    ("mlp.c_proj", "down", 4 * WIDTH, WIDTH),
)
FROZEN_LOSS, BASE_LOSS = 3.0, 1.2
FULL_PARAMETERS = 1_800_000
TAGS = {
    "precision": "fp32",
    "device": "cpu",
    "data": "rows.json",
    "data_digest": "d1",
    "tokens_digest": "t1",
    "base_hash": "b1",
    "code_version": "c1",
    "packages": "torch 2.13.0, peft 0.21.2",
}


def settings_of(label: str) -> dict[str, str]:
    """Return the parameters of a run of a method whose label is `NAME-rRANK[-LOW][-METRIC]`."""
    name, _, rest = label.partition("-r")
    rank, _, more = rest.partition("-")
    own = {"method.metric": more} if name == "empirical" else {}
    return {"cfg.epochs": "3.0", "method.name": name, "method.rank": rank, **own}


def plan_of(label: str, seed: int = 0) -> dict[str, Any]:
    """Return a plan of a six-layer GPT-2 of width 128 in the pattern that the label names."""
    rng = np.random.default_rng(seed)
    sites = []
    for layer in range(LAYERS):
        for module, role, fan_in, fan_out in SITES:
            position = layer / (LAYERS - 1)
            rank = 8
            if label.startswith("uniform-r16"):
                rank = 16
            elif label.startswith("linear_decay"):
                rank = int(16 - 12 * position)
            elif label.startswith("attention_heavy"):
                rank = 16 if role in ("qkv", "output") else 8
            elif label.startswith("three_band"):
                rank = int(16 * (0.6 if position < 0.3 else 1.2 if position < 0.7 else 1.0))
            elif label.startswith("empirical"):
                rank = int(rng.integers(2, 15))
            sites.append(
                {
                    "name": f"transformer.h.{layer}.{module}",
                    "layer": layer,
                    "role": role,
                    "in_features": fan_in,
                    "out_features": fan_out,
                    "rank": rank,
                    "alpha": 32.0,
                    "step_size": 32.0,
                    "parameters": rank * (fan_in + fan_out),
                }
            )
    total = sum(site["parameters"] for site in sites)
    shared = {"method": label, "budget": None, "scaling": "standard"}
    return {**shared, "trainable_parameters": total, "sites": sites}


def scores(loss: float, seed: int, examples: int = 40, fold: int = 0) -> EvalResult:
    """Return scores whose token-weighted loss is `loss` exactly, on examples shared by seeds."""
    shared = np.random.default_rng([fold, 1])
    tokens_E = shared.integers(4, 30, examples)
    noise_E = shared.normal(0, 0.3, examples) + np.random.default_rng([seed, fold]).normal(0, 0.1, examples)
    noise_E -= (noise_E * tokens_E).sum() / tokens_E.sum()
    nll_E = tokens_E * (loss + noise_E)
    correct_E = np.round(tokens_E * math.exp(-loss)).astype(np.int64)
    return EvalResult(
        example_ids=tuple(f"example-{fold}-{index:03d}" for index in range(examples)),
        nll_E=nll_E,
        tokens_E=tokens_E,
        correct_E=correct_E,
        exact_match_E=(noise_E + loss < 1.2).astype(np.float64),
    )


def trial(label: str, seed: int, loss: float, **changes: Any) -> TrialRecord:
    """Return one finished trial with a given test loss."""
    lr, fold = changes.pop("lr", 3e-4), changes.pop("fold", 0)
    plan = plan_of(label, seed)
    validation = changes.pop("validation_loss", loss + 0.01)
    steps = np.array([0, 20, 40, 60, 80, 100])
    fall = validation + (FROZEN_LOSS - validation) * np.exp(-steps / 18)
    fall[-1] = validation
    values: dict[str, Any] = {
        "run_id": f"{label}-{seed}-{fold}-{lr:g}",
        "method": label,
        "seed": seed,
        "fold": fold,
        "lr": lr,
        "status": "FINISHED",
        "trainable_parameters": plan["trainable_parameters"],
        "validation_loss": validation,
        "validation_curve": tuple(zip(steps.tolist(), fall.tolist(), strict=True)),
        "validation_tokens": tuple((1000 * steps).tolist()),
        "tags": {**TAGS, "order_digest": f"order-{seed}-{fold}"},
        "settings": settings_of(label),
        "test": scores(loss, seed, fold=fold),
        "plan": plan,
        "metrics": {
            "tokens_per_second": 5200.0 + 40 * seed,
            "peak_memory_bytes": 6.1e8,
            "train_seconds": plan["trainable_parameters"] / 1e4,
            "skipped_steps": 0.0,
            "trials_together": 1.0,
            "reduction_vs_full": 1 - plan["trainable_parameters"] / FULL_PARAMETERS,
            "efficiency_ratio": 1e5 / plan["trainable_parameters"] / loss,
        },
    }
    return TrialRecord(**{**values, **changes})


def failed(label: str, seed: int, reason: str, **changes: Any) -> TrialRecord:
    """Return a trial that the stability guard ended."""
    record = {"run_id": f"{label}-{seed}-failed", "fold": 0, "lr": 3e-4, **changes}
    return TrialRecord(method=label, seed=seed, status="FAILED", reason=reason, **record)


def study(
    effects: Mapping[str, float],
    seeds: Sequence[int] = range(6),
    noise: float = 0.01,
    rates: Sequence[float] = (3e-4,),
    folds: Sequence[int] = (0,),
) -> list[TrialRecord]:
    """Return trials of every method; `effects` are added to the loss, the best rate is the middle.

    Seeds have a spread of 0.05 that methods share, and one of `noise` that they do not.
    """
    records = []
    middle = rates[len(rates) // 2]
    for number, (label, effect) in enumerate(effects.items()):
        for seed in seeds:
            common = np.random.default_rng([seed, 9]).normal(0, 0.05)
            own = np.random.default_rng([seed, number, 3]).normal(0, noise)
            for lr in rates:
                penalty = 0.05 * math.log(lr / middle) ** 2
                loss = BASE_LOSS + effect + float(common + own) + penalty
                records += [trial(label, seed, loss, lr=lr, fold=fold) for fold in folds]
    return records


EFFECTS = {
    "uniform-r8": 0.0,
    "uniform-r16": -0.12,
    "linear_decay-r16-4": 0.004,
    "attention_heavy-r16-8": -0.05,
    "three_band-r16": 0.06,
    "empirical-r8-mean_abs_weight_gradient": 0.0,
}
