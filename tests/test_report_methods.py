"""The methods paragraph says what was done, and nothing that was not recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from synthetic_study import FROZEN_LOSS, failed, scores, study

from adaptive_lora.analysis.comparison import compare
from adaptive_lora.analysis.report.formats import methods_text
from adaptive_lora.results import TrialRecord

EFFECTS = {"uniform-r8": 0.0, "attention_heavy-r16-8": -0.05, "empirical-r8-fisher": 0.01}
SETTINGS = {
    "cfg.model": "embedded",
    "cfg.data": "rows.json",
    "cfg.epochs": "3.0",
    "cfg.max_steps": "None",
    "cfg.batch_size": "12",
    "cfg.accumulation": "2",
    "cfg.schedule": "cosine",
    "cfg.warmup_share": "0.1",
    "cfg.weight_decay": "0.01",
    "cfg.clip_norm": "1.0",
    "cfg.dropout": "0.0",
    "cfg.patience": "0",
    "cfg.loss_on": "response",
    "cfg.profile_batches": "8",
    "cfg.profile_batch_size": "4",
    "model.adapter_dtype": "torch.float32",
    "data.train_examples": "1000",
    "data.validation_examples": "120",
}


def records_with(
    settings: Mapping[str, str] = SETTINGS, seeds: Sequence[int] = range(6), **options: Any
) -> list[TrialRecord]:
    return [
        dataclasses.replace(record, settings={**record.settings, **settings})
        for record in study(EFFECTS, seeds, **options)
    ]


def text_of(records: Sequence[TrialRecord], **options: Any) -> str:
    comparison = compare(records, baseline="uniform-r8", base_scores=scores(FROZEN_LOSS, 0), **options)
    return methods_text(comparison, records)


def test_names_the_numbers_of_the_config() -> None:
    text = text_of(records_with(rates=(1e-4, 3e-4, 1e-3)), correction="max_t")
    for clause in (
        "2 methods (attention_heavy-r16-8 and empirical-r8-fisher) with uniform-r8 on the base "
        "model embedded and the data set rows.json.",
        "1,000 training, 120 validation and 40 test examples",
        "AdamW for 3 epochs, with 24 examples per optimiser step",
        "a cosine decay of the learning rate after a linear warm-up over 10 % of the steps",
        "weight decay 0.01, gradients clipped to norm 1",
        "compute precision float32, trainable weights in float32",
        "cross-entropy over the response's tokens",
        "Importance (fisher) was measured per seed on at most 32 training examples",
        "6 seeds (0, 1, 2, 3, 4, 5)",
        "the same batches in the same order",
        "the one of 0.0001, 0.0003 and 0.001 with the lowest mean validation loss",
        "chosen: 0.0003",
        "uniform-r8 has 98,304 trainable parameters",
        "exact two-sided sign-flip test",
        "least attainable with 6 seeds before correction: 0.0312",
        "corrected for 2 comparisons by the step-down max-T procedure",
        "95 % intervals over seeds (BCa bootstrap), the nominal confidence of a bootstrap expanded",
        "Software: torch 2.13.0, peft 0.21.2.",
    ):
        assert clause in text
    assert "dropout" not in text
    assert "failed" not in text


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"cfg.max_steps": "70"}, "3 epochs or at most 70 optimiser steps"),
        ({"cfg.warmup_share": "0.0", "cfg.schedule": "linear"}, "a linear decay of the learning"),
        ({"cfg.clip_norm": "0.0"}, "no clipping of gradients"),
        ({"cfg.dropout": "0.1"}, "dropout 0.1 before the adapters"),
        ({"cfg.patience": "3"}, "stopped after 3 validations without improvement"),
        ({"cfg.loss_on": "all"}, "cross-entropy over all tokens"),
    ],
)
def test_follows_the_settings(change: dict[str, str], clause: str) -> None:
    text = text_of(records_with({**SETTINGS, **change}))
    assert clause in text
    assert "warm-up over 0 %" not in text


def test_leaves_out_what_differs_or_is_not_recorded() -> None:
    records = records_with()
    other = {**records[0].settings, "cfg.weight_decay": "0.5"}
    records[0] = dataclasses.replace(records[0], settings=other)
    assert "weight decay" not in text_of(records)
    bare = [dataclasses.replace(record, settings={}, tags={}) for record in study(EFFECTS, range(3))]
    text = text_of(bare)
    for absent in ("AdamW", "same order", "Software", "base model", "training examples", "None"):
        assert absent not in text
    assert "40 test examples" in text


def test_says_when_rates_were_not_tuned_and_trials_failed() -> None:
    records = [*records_with(), failed("uniform-r8", 6, "out of memory")]
    text = text_of(records)
    assert "The peak learning rate was 0.0003 for all methods and was not tuned." in text
    assert "1 of 19 trials failed" in text


def test_one_seed_claims_no_interval() -> None:
    text = text_of(records_with(seeds=[0]))
    assert "Intervals are" not in text
    assert "1 seed (0)" in text
