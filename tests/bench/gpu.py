"""Trials together on one GPU beside successive PEFT + Trainer runs: `python tests/bench/gpu.py`.

DialoGPT-medium's shape (24 layers, width 1024, 50,257 tokens; random weights, dropout 0 for all) in
bfloat16: 8 trials of 8 examples a step, with different ranks, rates and seeds, first one
after another with transformers' Trainer on PEFT, then one after another and together by this
package. Prints trials per hour, useful FLOPs as a share of the GPU's own measured bf16 matrix
product (4 a parameter and token in the blocks, 4 a parameter and supervised token in the head), and
peak memory; under 8 minutes. Tokens are those of the examples; padding counts nothing.

Lengths follow Alpaca's rows under its template (log-normal, fitted to its first 128 rows), or are
those of a real file (`--data FILE --tokenizer FOLDER`). Without a GPU it refuses; `--device cpu
--quick` runs every line of it at toy size, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

TRIALS, BATCH = 8, 8
RANKS = (8, 16, 4, 8, 32, 8, 16, 12)
RATES = (3e-4, 1e-3, 3e-4, 1e-4, 3e-4, 3e-3, 1e-4, 3e-4)
PROMPT, RESPONSE = (4.1, 0.35), (4.3, 1.0)
"""Mean and deviation of the logarithm of tokens."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders train."""

    device: str
    precision: str
    steps: int
    config: Any
    examples: Sequence[Any]

    def model(self) -> Any:
        """Return the same frozen base each time."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        with torch.device(self.device):
            made = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        return made.requires_grad_(False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--quick", action="store_true", help="toy size, to see that it runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps a trial")
    parser.add_argument("--model", type=Path, help="folder with a config.json [default: built]")
    parser.add_argument("--data", type=Path, help="Alpaca-like JSON [default: generated lengths]")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer's folder, for --data")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here: figures of the CPU would say nothing; --device cpu --quick tries it.")
    if given.device == "cpu" and not given.quick:
        sys.exit("on a CPU only --quick, to see that it runs; its figures mean nothing.")
    setting = prepare(given)
    figures = measure(setting)
    print(json.dumps(figures, indent=1) if given.json else table(figures))


def prepare(given: argparse.Namespace) -> Setting:
    """Return the setting that the arguments ask for."""
    from transformers import AutoConfig, GPT2Config

    if given.quick:
        config: Any = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, bos_token_id=1, eos_token_id=1)
    elif given.model:
        config = AutoConfig.from_pretrained(given.model)
    else:
        config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, vocab_size=50_257)
    for name in list(vars(config)):
        if ("drop" in name) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    steps = 3 if given.quick else given.steps
    lengths = real_lengths(given) if given.data else drawn_lengths(steps * BATCH)
    return Setting(
        device=given.device,
        precision="bf16" if given.device == "cuda" else "fp32",
        steps=steps,
        config=config,
        examples=examples_of(lengths, config.vocab_size, given.quick),
    )


def drawn_lengths(count: int) -> list[tuple[int, int]]:
    """Return (prompt, response) tokens by Alpaca's distribution, 512 at most together."""
    draw = np.random.default_rng(0)
    prompts = np.clip(np.exp(draw.normal(*PROMPT, count)), 30, 300).astype(int)
    responses = np.clip(np.exp(draw.normal(*RESPONSE, count)), 1, 212).astype(int)
    return list(zip(prompts.tolist(), responses.tolist(), strict=True))


def real_lengths(given: argparse.Namespace) -> list[tuple[int, int]]:
    """Return (prompt, response) tokens of a file's rows under Alpaca's template."""
    from transformers import AutoTokenizer

    from adaptive_lora.config import study_from
    from adaptive_lora.data import load_examples, tokenize

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    loaded = load_examples(study_from({"data": str(given.data), "max_tokens": 512}).data)
    rows = [e for e in loaded.examples if len(tokenizer(e.prompt)["input_ids"]) < 500]
    tokenized = tokenize(rows, tokenizer, max_tokens=512, loss_on="response")
    return [(e.prompt_length, len(e.input_ids) - e.prompt_length) for e in tokenized]


def examples_of(lengths: Sequence[tuple[int, int]], vocabulary: int, quick: bool) -> list[Any]:
    """Return examples of random tokens with these lengths."""
    from adaptive_lora.data import TokenizedExample

    draw = np.random.default_rng(1)
    return [
        TokenizedExample(
            id=str(number),
            input_ids=tuple(draw.integers(2, vocabulary, prompt + response).tolist()),
            first_label=prompt,
            prompt_length=prompt,
            response="",
        )
        for number, (prompt, response) in enumerate(lengths[: 24 if quick else None])
    ]


def measure(setting: Setting) -> dict[str, Any]:
    """Run all contenders and return the figures."""
    rate = product_rate(setting)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "precision": setting.precision,
        "trials": TRIALS,
        "steps": setting.steps,
        "matrix_product_tflops": rate / 1e12,
    }
    for name, run in (("peft_trainer", trainer), ("serial", serial), ("together", together)):
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, tokens, flops, losses = run(setting)
        found[name] = {
            "trials_per_hour": TRIALS * 3600 / seconds,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "share_of_matrix_product": flops / seconds / rate,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if setting.device == "cuda" else math.nan,
            "mean_losses": losses,
        }
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    for name in ("serial", "together"):
        ratio = found[name]["trials_per_hour"] / found["peft_trainer"]["trials_per_hour"]
        found[f"{name}_vs_peft_trainer"] = ratio
    found["together_vs_serial"] = found["together"]["trials_per_hour"] / found["serial"]["trials_per_hour"]
    pairs = zip(found["together"]["mean_losses"], found["serial"]["mean_losses"], strict=True)
    found["together_vs_serial_loss"] = max(abs(one - other) for one, other in pairs)
    return found


def product_rate(setting: Setting) -> float:
    """Return FLOPs a second of a large matrix product, the best of several."""
    size = 8192 if setting.device == "cuda" else 512
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    times = [clocked(setting, lambda: [a @ b for _ in range(10)]) / 10 for _ in range(5)]
    return 2 * size**3 / min(times)


def clocked(setting: Setting, work: Callable[[], object]) -> float:
    """Return the seconds of a piece of work, waiting for the GPU at both ends."""
    if setting.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def useful(setting: Setting, model: Any, batches: Sequence[Sequence[Any]]) -> tuple[int, float]:
    """Return tokens and useful FLOPs of batches of examples."""
    head = model.get_output_embeddings().weight.numel()
    embeddings = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    every = sum(p.numel() for p in model.parameters())
    blocks = every - embeddings - (0 if model.config.tie_word_embeddings else head)
    tokens = sum(len(e.input_ids) for batch in batches for e in batch)
    learned = sum(e.supervised_tokens for batch in batches for e in batch)
    return tokens, 4.0 * blocks * tokens + 4.0 * head * learned


def order_of(setting: Setting, seed: int) -> list[list[Any]]:
    """Return the batches of a trial."""
    from adaptive_lora.data import training_batches

    batches = training_batches(setting.examples, batch_size=BATCH, seed=seed, collate=list)
    return [next(batches) for _ in range(setting.steps)]  # type: ignore[misc]


def trainer(setting: Setting) -> tuple[float, int, float, list[float]]:
    """Train one after another with PEFT and transformers' Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.utils import logging as hf_logging

    from adaptive_lora.data import collate
    from adaptive_lora.models.sites import find_sites

    hf_logging.disable_progress_bar()
    model = setting.model()
    names = [site.name for site in find_sites(model)]
    seconds, tokens, flops, losses = 0.0, 0, 0.0, list[float]()
    for seed in range(-1, TRIALS):  # the first warms up
        rank, rate = RANKS[seed], RATES[seed]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=True)
        batches = order_of(setting, max(0, seed))
        if seed < 0:
            batches = batches[:2]
        rows = [example for batch in batches for example in batch]
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=len(batches),
                learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=len(batches) // 10,
                bf16=setting.precision == "bf16", use_cpu=setting.device == "cpu",
                train_sampling_strategy="sequential", remove_unused_columns=False, report_to=[],
                save_strategy="no", logging_steps=len(batches), disable_tqdm=True,
            )  # fmt: skip
            run = Trainer(
                model=get_peft_model(model, config),
                args=arguments,
                train_dataset=rows,
                data_collator=lambda items: {
                    **(batch := collate(items, 0)).inputs, "labels": batch.labels
                },
            )  # fmt: skip
            run.remove_callback(PrinterCallback)
            spent = clocked(setting, run.train)
        model = run.model.unload()
        if seed >= 0:
            losses.append(run.state.log_history[0]["loss"])
            seconds += spent
            more = useful(setting, model, batches)
            tokens, flops = tokens + more[0], flops + more[1]
    return seconds, tokens, flops, losses


class BaseContext:
    """This package's training of the setting's trials."""

    def __init__(self, setting: Setting) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        from adaptive_lora.config import study_from
        from adaptive_lora.models.base import BaseModel, BaseReference
        from adaptive_lora.models.device import start_runtime
        from adaptive_lora.models.tasks import CausalTask

        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        self.setting, self.model = setting, setting.model()
        runtime = start_runtime(setting.precision, cpu=setting.device == "cpu")
        base = BaseModel(
            model=self.model,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b"),
            reference=BaseReference(source="", name="", revision=None, content_hash=""),
            max_positions=None,
            task={},
        )
        options = {"max_steps": setting.steps, "epochs": 10**6, "batch_size": BATCH}
        self.task = CausalTask(study_from({**options, "validations": 1}), runtime, base)

    def train(self, seed: int) -> Any:
        """Train a trial."""
        from adaptive_lora.allocation import MethodSpec, allocate
        from adaptive_lora.methods.adapters import attach, detach
        from adaptive_lora.models.sites import find_sites
        from adaptive_lora.training import Trainer, TrainInputs

        spec = MethodSpec.build("uniform", {"rank": RANKS[seed]})
        plan = allocate(spec, find_sites(self.model))
        adapted = attach(self.model, plan, seed=max(0, seed), dropout=0.0)
        adapted.to(self.setting.device)
        inputs = TrainInputs(
            examples=self.setting.examples,
            collate=self.task.collate,
            validate=lambda model: 0.0,
            loss=self.task.loss,
            losses_by_example=self.task.losses_by_example,
            running=self.task.running,
        )
        try:
            config, runtime = self.task.config.train, self.task.runtime
            return Trainer(adapted, inputs, config, runtime, lr=RATES[seed], seed=max(0, seed)).run()
        finally:
            detach(adapted)


def serial(setting: Setting) -> tuple[float, int, float, list[float]]:
    """Train one after another by this package."""
    context, results = BaseContext(setting), []
    context.train(-1)  # warms up
    seconds = clocked(setting, lambda: results.extend(context.train(seed) for seed in range(TRIALS)))
    return sums(setting, context, seconds, results)


def together(setting: Setting) -> tuple[float, int, float, list[float]]:
    """Train all together by this package."""
    from adaptive_lora.training.joint.group import JointGroup

    context = BaseContext(setting)

    JointGroup([partial(context.train, -1)] * 2).run()  # warms up
    results: list[Any] = []
    group = JointGroup([partial(context.train, seed) for seed in range(TRIALS)])
    seconds = clocked(setting, lambda: results.extend(group.run()))
    return sums(setting, context, seconds, results)


def sums(setting: Setting, context: BaseContext, seconds: float, results: Sequence[Any]) -> Any:
    """Return seconds, tokens, useful FLOPs and each trial's mean loss."""
    tokens, flops = 0, 0.0
    for seed in range(TRIALS):
        more = useful(setting, context.model, order_of(setting, seed))
        tokens, flops = tokens + more[0], flops + more[1]
    assert tokens == sum(result.tokens for result in results)
    return seconds, tokens, flops, [float(np.mean(result.losses)) for result in results]


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        f"{figures['device']}, {figures['precision']}: a large matrix product does "
        f"{figures['matrix_product_tflops']:.3g} TFLOP/s",
        "",
        "| 8 trials x batch 8 | trials an hour | tokens/s | of the matrix product | peak GiB |",
        "|---|---|---|---|---|",
    ]
    names = {
        "peft_trainer": "PEFT + Trainer, one after another",
        "serial": "this package, one after another",
        "together": "this package, together",
    }
    for key, name in names.items():
        found = figures[key]
        lines.append(
            f"| {name} | {found['trials_per_hour']:,.0f} | {found['tokens_per_second']:,.0f} | "
            f"{found['share_of_matrix_product']:.1%} | {found['peak_gib']:.1f} |"
        )
    lines += [
        "",
        f"together / PEFT + Trainer: {figures['together_vs_peft_trainer']:.2f}x",
        f"together / one after another: {figures['together_vs_serial']:.2f}x, mean losses of trials differ by "
        f"{figures['together_vs_serial_loss']:.1e} at most",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
