"""What is measured, each in a process: `python speed_contenders.py NAME SHARED LOSS_ON`."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import speed_setting as setting
import torch
from speed_setting import Turns

from adaptive_lora.data import TokenizedExample

Data = Sequence[TokenizedExample]


def product(data: Data, turns: Turns) -> None:
    """Serve the machine's own rate: float32 products of 2048 x 2048, by the faster library."""
    from adaptive_lora.models.kernels.products import product as by_onednn

    size, repeats = 2048, 6
    a, out = torch.randn(size, size), torch.empty(size, size)
    ways: list[Callable[[], object]] = [lambda: torch.mm(a, a, out=out), lambda: by_onednn(a, a)]

    def seconds(way: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            way()
        return time.perf_counter() - started

    way = min(ways, key=lambda way: min(seconds(way) for _ in range(3)))

    def step() -> dict[str, float]:
        seconds(way)
        return {"work": 2.0 * repeats * size**3}

    turns.serve(step)


def plain(data: Data, turns: Turns) -> None:
    """Serve the loop that everybody writes: padded batches, PEFT, the model's own loss."""
    from transformers import get_scheduler

    model = setting.adapted(setting.base()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.RATE, weight_decay=0.0)
    steps = len(data) // setting.BATCH
    schedule = get_scheduler("cosine", optimizer, round(0.1 * steps), steps)
    stream = setting.batches(data)

    def step() -> dict[str, float]:
        batch = next(stream)
        loss = model(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return {"tokens": batch.tokens, "loss": float(loss)}

    turns.serve(step)


def ours(data: Data, turns: Turns) -> None:
    """Serve the package's own training, as a study runs it."""
    from adaptive_lora.config import study_from
    from adaptive_lora.models.base import BaseModel
    from adaptive_lora.models.device import start_runtime
    from adaptive_lora.models.losses import causal_loss
    from adaptive_lora.models.tasks import CausalTask
    from adaptive_lora.training import Trainer, TrainInputs

    runtime = start_runtime("fp32", cpu=True)
    base: Any = setting.base()
    holder: Any = BaseModel.__new__(BaseModel)
    object.__setattr__(holder, "model", base)
    task = CausalTask(study_from({"batching": "packed"}), runtime, holder)

    inputs = TrainInputs(
        examples=data, collate=setting.collate, validate=lambda model: 0.0, loss=causal_loss, running=task.running
    )
    model = setting.adapted(base)
    trainer = Trainer(model, inputs, setting.TRAINING, runtime, lr=setting.RATE, seed=setting.SEED)
    with task.running(model):
        while True:
            turns.wait()
            started = time.perf_counter()
            window = trainer.next_window()
            loss = trainer.learn(window)
            trainer.apply(window, loss)
            turns.answer(
                seconds=time.perf_counter() - started,
                tokens=sum(batch.tokens for batch in window),
                supervised=sum(batch.supervised_tokens for batch in window),
                loss=loss,
            )


def sft_trainer(data: Data, turns: Turns) -> None:
    """Serve TRL's SFTTrainer as it comes (it recomputes activations), in float32 on the CPU."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    order = chain.from_iterable(_order(data))
    rows = [
        {
            "input_ids": list(example.input_ids),
            "completion_mask": [int(at >= example.first_label) for at in range(len(example.input_ids))],
        }
        for example in islice(order, len(data))
    ]

    class Turn(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.wait()
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                first = (state.global_step - 1) * setting.BATCH
                tokens = sum(len(r["input_ids"]) for r in rows[first : first + setting.BATCH])
                turns.answer(seconds=time.perf_counter() - self.started, tokens=tokens, loss=logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=setting.BATCH, max_length=setting.LONGEST,
            learning_rate=setting.RATE, train_sampling_strategy="sequential", logging_steps=1,
            num_train_epochs=1, save_strategy="no",
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "gpt2-tokenizer")
        tokenizer.pad_token = tokenizer.eos_token
        trainer = SFTTrainer(
            model=setting.adapted(setting.base()),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Turn()],
        )
        trainer.train()


def _order(data: Data) -> Any:
    """Yield the examples of each batch in the seed's order."""
    from adaptive_lora.seeding import rng_for

    order = rng_for(setting.SEED, "order", 0).permutation(len(data))
    for start in range(0, len(order), setting.BATCH):
        yield [data[index] for index in order[start : start + setting.BATCH]]


CONTENDERS: dict[str, Callable[[Data, Turns], None]] = {
    "product": product,
    "plain_peft": plain,
    "sft_trainer": sft_trainer,
    "adaptive_lora": ours,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    name, SHARED, loss_on = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    own = Turns()
    CONTENDERS[name](setting.examples(SHARED, loss_on), own)
