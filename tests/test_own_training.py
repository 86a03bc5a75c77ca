"""`al.lora_config` in a plain loop and in SFTTrainer: plan and losses are those of this package's trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import save_byte_tokenizer
from own_models import ARCHITECTURES, Tensors
from test_trainers import losses as logged_losses
from test_trainers import sft_trainer
from transformers import AutoTokenizer, get_scheduler

import adaptive_lora as al
from adaptive_lora.allocation import RankPlan
from adaptive_lora.config import TrainConfig
from adaptive_lora.data import Batch, training_batches
from adaptive_lora.methods.adapters.attach import attach, detach, lora_layers
from adaptive_lora.models.device import start_runtime
from adaptive_lora.training import Trainer, TrainInputs

CONFIG = TrainConfig(epochs=1, batch_size=4, batching="padded", validations=1)
LR = 2e-2
DECODERS = ("gpt2", "llama", "qwen2", "mistral", "gpt_neox")


def trained(model: Any) -> Tensors:
    """Return copies of the trained tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def with_our_trainer(model: Any, report: Any, batches: list[Tensors], loss: Any) -> tuple[Tensors, list[float], Any]:
    """Train a plan as a trial does; return the weights at the start, the losses and the layers' ranks and scales."""
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches for row in range(4)]
    adapted = attach(model, report.plan, seed=0, dropout=0.0, head=report.head)
    start = trained(adapted)
    inputs = TrainInputs(examples=rows, collate=collate, validate=lambda model: 0.0, loss=loss)
    losses = Trainer(adapted, inputs, CONFIG, start_runtime("fp32", cpu=True), lr=LR, seed=0).run().losses
    built = built_in(adapted)
    detach(adapted)
    return start, list(losses), built


def collate(rows: Any) -> Batch:
    joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Batch(labels=joined.pop("labels"), inputs=joined)


def built_in(adapted: Any) -> dict[str, tuple[int, float, float]]:
    return {n: (x.r["default"], x.lora_alpha["default"], x.scaling["default"]) for n, x in lora_layers(adapted).items()}


def with_plain_peft(adapted: Any, start: Tensors, batches: list[Tensors]) -> list[float]:
    """Train by a loop as scripts have it, on the model's own loss; return the losses."""
    adapted.load_state_dict(start, strict=False)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, round(0.1 * len(batches)), len(batches))
    adapted.train()
    losses = []
    for batch in batches:
        loss = adapted(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_equal_plan_and_equal_losses(name: str, tmp_path: Path) -> None:
    make, batches, loss = ARCHITECTURES[name]
    model, given = make(), batches()
    # BERT's few examples leave waterfill nothing above the noise, so that its ranks would be equal
    method = "empirical:metric=whitened_gradient" if name == "bert" else "waterfill"
    report = al.allocate(al.profile(model, given), "uniform-4", method, model=model)
    config = al.lora_config(model, method, budget="uniform-4", dataloader=iter(given))
    assert isinstance(report.plan, RankPlan)
    assert len(set(report.plan.rank_pattern().values())) > 1
    start, ours, planned = with_our_trainer(model, report, given, loss)
    adapted = peft.get_peft_model(model, config)
    assert built_in(adapted) == planned
    assert adapted.peft_config["default"].modules_to_save == (["classifier"] if name == "bert" else None)
    al.audit(adapted, report)
    assert trained(adapted).keys() == start.keys()
    ordered = in_order_of_a_trial(given)
    plain = with_plain_peft(adapted, start, ordered)
    assert plain == pytest.approx(ours, abs=1e-6)
    assert abs(plain[-1] - plain[0]) > 1e-3
    if name in DECODERS:
        save_byte_tokenizer(tmp_path)
        rows = [
            {key: batch[key][row].tolist() for key in ("input_ids", "labels")} for batch in ordered for row in range(4)
        ]
        trainer = sft_trainer(
            make(), tmp_path, rows, peft_config=config, callbacks=[al.AuditCallback(report)], learning_rate=LR,
            per_device_train_batch_size=4, max_steps=len(ordered), warmup_steps=round(0.1 * len(ordered)),
            lr_scheduler_type="cosine", processing_class=AutoTokenizer.from_pretrained(tmp_path),
        )  # fmt: skip
        trainer.model.load_state_dict(start, strict=False)
        trainer.train()
        assert logged_losses(trainer) == pytest.approx(ours, abs=1e-5)


def in_order_of_a_trial(batches: list[Tensors]) -> list[Tensors]:
    """Return the batches in the order that a trial of seed 0 sees them."""
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches for row in range(4)]
    drawn = training_batches(rows, batch_size=4, seed=0, collate=collate)
    return [{**batch.inputs, "labels": batch.labels} for batch in (next(drawn) for _ in batches)]
