"""The reference methods on real Alpaca rows with the real GPT-2 tokenizer, at laptop size.

Pretrains a small GPT-2 on GSM8K text (no Alpaca row is in it), then runs the published methods over
two seeds and prints the table. About 10 minutes on 2 cores:

    python tests/bench/alpaca_study.py --data ../shared --work /tmp/alpaca-study
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from adaptive_lora.config import study_from
from adaptive_lora.study import run_study

LAYERS, WIDTH, HEADS, TOKENS, ROWS = 4, 128, 4, 128, 8


def pretrain(data: Path, folder: Path, steps: int) -> None:
    """Train the base on packed GSM8K text and save it with the GPT-2 tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "gpt2-tokenizer")
    lines = (data / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    text = "<|endoftext|>".join(f"{item['question']}\n{item['answer']}" for item in documents)
    stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = stream[: len(stream) // TOKENS * TOKENS].view(-1, TOKENS)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=512,
            activation_function="gelu_pytorch_tanh", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order = torch.randperm(len(rows))
    for step in range(steps):
        batch = rows[order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"pretraining step {step} loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Pretrain where there is no base yet, run the study, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--work", type=Path, required=True, help="folder for base and results")
    parser.add_argument("--steps", type=int, default=400, help="pretraining steps")
    arguments = parser.parse_args()
    base, started = arguments.work / "base", time.perf_counter()
    if not base.exists():
        pretrain(arguments.data, base, arguments.steps)
    study = study_from(
        {
            "study": "alpaca",
            "model": str(base),
            "data": str(arguments.data / "data" / "alpaca_en_demo.json"),
            "max_examples": 200,
            "max_tokens": 256,
            "methods": "uniform:rank=8 uniform:rank=16 linear_decay attention_heavy three_band "
            "empirical:rank=8",
            "seeds": "0 1",
            "lr": "3e-3",
            "epochs": 1,
            "precision": "fp32",  # the same table on every machine
            "tracking_uri": f"sqlite:///{arguments.work / 'mlflow.db'}",
            "output": str(arguments.work / "out"),
        }
    )
    outcome = run_study(study, Console(width=150))
    print(f"report {outcome.judgement.report}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
