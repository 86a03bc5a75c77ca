"""Callbacks for transformers' Trainer and TRL's SFTTrainer: ranks that change in training, and the audit as built."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import adaptive_lora as al
from adaptive_lora.data import training_batches
from adaptive_lora.errors import AdapterError, AdaptiveLoraError, ConfigError, ModelError
from adaptive_lora.methods.adapters.attach import attach
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.rank_callback import STATE
from adaptive_lora.runner.trial import run_trial

STEPS = 16
GROW_PRUNE = {"method": "grow_prune", "budget": "uniform-3", "interval": 2, "move_share": 0.3}
ADALORA = {"method": "adalora", "budget": "uniform-3", "interval": 2}
BOTH = pytest.mark.parametrize("chosen", [GROW_PRUNE, ADALORA], ids=["grow_prune", "adalora"])
COMMON = {
    "per_device_train_batch_size": 5, "max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "train_sampling_strategy": "sequential",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def losses(trainer: Trainer) -> list[float]:
    """Return the loss of every step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# --- against the project's own trainer


def sft_trainer(model: Any, folder: Path, rows: list[dict[str, Any]], **more: Any) -> Trainer:
    """Return TRL's trainer for rows of token ids and labels."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    own = {name: more.pop(name) for name in ("callbacks", "processing_class", "peft_config") if name in more}
    args = SFTConfig(str(folder), bf16=False, activation_checkpointing=False, max_length=None, **{**COMMON, **more})
    made: Trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), **own)
    return made


def plain_trainer(model: Any, folder: Path, rows: list[dict[str, Any]], **more: Any) -> Trainer:
    """Return transformers' trainer for the same."""
    callbacks, collator = more.pop("callbacks", None), DataCollatorForSeq2Seq(more.pop("processing_class"))
    args = TrainingArguments(str(folder), **{**COMMON, **more})
    return Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=callbacks)  # type: ignore[arg-type]


def study_rows(context: StudyContext, batches: int, size: int) -> list[dict[str, Any]]:
    """Return the examples of a study's first batches, in its order."""
    found = training_batches(context.splits(0).train, batch_size=size, seed=0, collate=context.task.collate)
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
        for batch in islice(found, batches)
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    ]
    assert len(rows) == batches * size
    return rows


@BOTH
def test_losses_and_ranks_are_those_of_the_own_trainer(
    make_bench: Callable[..., StudyContext], llama_folder: Path, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    """With accumulation, dropout, clipping, weight decay and a schedule with warm-up; AdaLoRA's penalty once a step."""
    options = ",".join(f"{name}={value}" for name, value in chosen.items() if name != "method")
    context = make_bench(
        model=str(llama_folder), methods=f"{chosen['method']}:{options}", seeds="0", max_steps=STEPS, epochs=99,
        batch_size=5, accumulation=2, dropout=0.1, batching="padded", clip_norm=0.5, weight_decay=0.1,
    )  # fmt: skip
    trial = next(context.config.trials())
    own = run_trial(context, trial, tmp_path / "own")
    rows = study_rows(context, 2 * STEPS, 5)
    for make in (plain_trainer, sft_trainer):
        callback = al.RankCallback(**chosen, dropout=0.1)
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        trainer = make(
            callback.attach(base), tmp_path / make.__name__, rows, callbacks=[callback], warmup_steps=round(STEPS / 10),
            gradient_accumulation_steps=2, max_grad_norm=0.5, weight_decay=0.1, lr_scheduler_type="cosine",
            processing_class=AutoTokenizer.from_pretrained(llama_folder),
        )  # fmt: skip
        trainer.train()
        assert losses(trainer) == pytest.approx(own.train.losses, abs=2e-6)
        assert callback.history == own.history
        assert len(callback.history) > 2
        assert callback.plan.rank_pattern() == own.plan.rank_pattern()
        al.audit(trainer.model, callback.plan)


def test_fixed_ranks_in_sft_trainer_train_as_in_the_own_trainer(
    make_bench: Callable[..., StudyContext], llama_folder: Path, tmp_path: Path
) -> None:
    method = "linear_decay:rank=6,low_rank=2"
    context = make_bench(model=str(llama_folder), methods=method, seeds="0", max_steps=6, epochs=99, batch_size=5)
    own = run_trial(context, next(context.config.trials()), tmp_path / "own")
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    report = al.plan(base, method)
    assert report.plan.rank_pattern() == own.plan.rank_pattern()
    trainer = sft_trainer(
        base, tmp_path / "sft", study_rows(context, 6, 5), peft_config=al.lora_config(base, method), max_steps=6,
        callbacks=[al.AuditCallback(report)], lr_scheduler_type="cosine", warmup_steps=1,
        processing_class=AutoTokenizer.from_pretrained(llama_folder),
    )  # fmt: skip
    start_equal(trainer.model, llama_folder, report)
    trainer.train()
    assert losses(trainer) == pytest.approx(own.train.losses, abs=2e-6)


def start_equal(adapted: Any, folder: Path, report: Any) -> None:
    """Give a model of PEFT the initial weights that a study's trial has; PEFT draws its own."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft.set_peft_model_state_dict(
        adapted, peft.get_peft_model_state_dict(attach(base, report.plan, seed=0, dropout=0))
    )


SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 258}


# --- checkpoints and the end


def token_rows(count: int) -> list[dict[str, Any]]:
    """Return rows of ten token ids that can be learned: each id follows from the one before."""
    texts = [[(n + 3 * k) % 23 for k in range(10)] for n in range(count)]
    # Where the first id has a label too, transformers divides GPT-2's loss by one more label than it predicts.
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in texts]


def llama() -> Any:
    """Return the same small Llama each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZE))


class Small(Trainer):
    """A trainer of a small model with a callback, and of what the trainer is to have beside it."""

    def __init__(self, callback: Any, folder: Path, model: Any = None, beside: Any = (), **more: Any) -> None:
        made = {name: more.pop(name) for name in ("optimizers", "eval_dataset", "train_dataset") if name in more}
        args = TrainingArguments(str(folder), **{**COMMON, "per_device_train_batch_size": 4, **more})
        self.callback = callback
        super().__init__(
            callback.attach(llama()) if model is None else model,
            args,
            **{"train_dataset": token_rows(64), **made},
            callbacks=[*beside, callback],
        )

    def adapter(self) -> dict[str, torch.Tensor]:
        """Return the adapter as it would be saved."""
        return peft.get_peft_model_state_dict(self.model)


def eight_bit(callback: Any) -> dict[str, Any]:
    """Return a model and 8-bit AdamW for it, as a trainer is given them."""
    bnb = pytest.importorskip("bitsandbytes")
    model = callback.attach(llama())
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "weight_decay": 0.0}]
    return {"model": model, "optimizers": (bnb.optim.AdamW8bit(groups, lr=1e-2, min_8bit_size=64), None)}


def plainly(callback: Any) -> dict[str, Any]:
    """Return gradient accumulation and checkpointing, a schedule and bf16."""
    return {
        "gradient_accumulation_steps": 2, "activation_checkpointing": True, "lr_scheduler_type": "cosine", "bf16": True,
        "per_device_train_batch_size": 2, "weight_decay": 0.1,
    }  # fmt: skip


@BOTH
@pytest.mark.parametrize(("settings", "stop"), [(plainly, 12), (eight_bit, 8)])
def test_resumed_is_the_uninterrupted_training_and_the_end_is_a_stock_adapter(
    tmp_path: Path, chosen: dict[str, Any], settings: Callable[[Any], dict[str, Any]], stop: int
) -> None:
    """The checkpoint is from between two changes of ranks, or from after the last."""

    def trainer(**more: Any) -> Small:
        callback = al.RankCallback(**chosen, dropout=0.1)
        options = {"save_strategy": "steps", "save_steps": stop, **settings(callback), **more}
        return Small(callback, tmp_path / "run", beside=[al.AuditCallback(callback)], **options)

    whole = trainer()
    whole.train()
    changes = [event.step for event in whole.callback.history]
    assert changes[1] > 2
    assert stop == 12 or changes[-1] > stop  # the last one, at 6 or 10, depends on the processor
    assert changes[-1] <= 10
    assert whole.callback.plan.trainable_parameters <= whole.callback.plan.budget
    resumed = trainer(save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert resumed.callback.history == whole.callback.history
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(tensor, resumed.adapter()[name]) for name, tensor in whole.adapter().items())
    whole.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / STATE).exists()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    al.audit(loaded, whole.callback.plan)
    ids = torch.tensor([token_rows(1)[0]["input_ids"]])
    # The trainer's model is still wrapped in autocast, its forward pass below is not.
    assert torch.equal(loaded.eval()(ids).logits, whole.model.get_base_model().eval()(ids).logits)


@BOTH
def test_the_best_model_is_one_with_final_ranks(tmp_path: Path, chosen: dict[str, Any]) -> None:
    class Worse(Small):
        """A trainer whose evaluations get worse from the start on."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_loss": float(self.state.global_step)}

    callback = al.RankCallback(**chosen)
    trainer = Worse(
        callback, tmp_path, eval_dataset=token_rows(2), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=4, save_strategy="steps", save_steps=4, save_only_model=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    assert 8 <= callback.history[-1].step <= 10
    al.audit(trainer.model, callback.plan)
    if chosen is GROW_PRUNE:  # its checkpoints are plain LoRA
        best = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-12")
        kept = peft.get_peft_model_state_dict(best)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in trainer.adapter().items())


@BOTH
def test_a_head_is_trained_and_saved(tmp_path: Path, chosen: dict[str, Any]) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3))

    rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(token_rows(40))]
    callback = al.RankCallback(**chosen)
    trainer = Small(callback, tmp_path, model=callback.attach(base()), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.equal(loaded.get_base_model().classifier.weight, base().classifier.weight)


def test_the_penalty_is_scaled_as_losses_in_half_precision_are(tmp_path: Path) -> None:
    callback = al.RankCallback(**ADALORA)
    trainer = Small(callback, tmp_path)
    trainer.create_optimizer()
    trainer.state.max_steps = STEPS
    callback.on_train_begin(trainer.args, trainer.state, None, model=trainer.model, optimizer=trainer.optimizer)
    gradients = []
    for scale in (None, 8.0):
        trainer.model.zero_grad()
        wrapped = trainer.accelerator.prepare(trainer.optimizer)
        wrapped.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        callback.on_step_begin(trainer.args, trainer.state, None, optimizer=wrapped)
        gradients.append([p.grad for n, p in trainer.model.named_parameters() if "lora_A" in n])
    assert all(torch.equal(8 * plain, scaled) for plain, scaled in zip(*gradients, strict=True))


def test_a_training_that_ends_early_says_what_it_costs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        """Ends a training at step 6."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    callback = al.RankCallback(**ADALORA)
    Small(callback, tmp_path, beside=[Stop()]).train()
    assert callback.plan.trainable_parameters > callback.plan.budget
    assert (
        f"at step 6, before the last change of ranks at step 10; the adapter has {callback.plan.trainable_parameters:,}"
        in (caplog.text)
    )


# --- what is refused


def test_methods_and_options_are_refused_by_name() -> None:
    for given, words in {
        ("waterfill",): "required grow_prune or adalora",
        ("grow_prune", "batch_size", 4): "batch_size is set in the model or in TrainingArguments",
        ("grow_prune", "lora_plus", 16): "lora_plus is a learning rate",
        ("grow_prune", "dropout", 1.0): "below 1; got 1.0",
        ("grow_prune", "dropout", "no"): "below 1; got 'no'",
        ("adalora", "move_share", 0.1): "move_share",
        ("adalora", "budget", "uniform-0"): "budget",
    }.items():
        with pytest.raises(ConfigError, match=words):
            al.RankCallback(given[0], **dict([given[1:]] if given[1:] else []))  # type: ignore[arg-type]


def test_models_are_refused_by_name() -> None:
    callback = al.RankCallback(**ADALORA)
    for call in (lambda: callback.plan, lambda: callback.history, callback.audit, callback.finish):
        with pytest.raises(AdapterError, match=r"has no model yet"):
            call()
    spread = llama()
    spread.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ModelError, match=r"is on 0, cpu; required one device"):
        callback.attach(spread)
    adapted = callback.attach(llama())
    with pytest.raises(AdapterError, match=r"nothing was trained"):
        callback.finish()
    with pytest.raises(ModelError, match=r"has adapters already"):
        callback.attach(adapted)
    with pytest.raises(ModelError, match=r"required a loaded model .* got the text 'embedded'"):
        callback.attach("embedded")
    with pytest.raises(AdaptiveLoraError, match=r"budget"):
        al.RankCallback("adalora", budget="10").attach(llama())


def test_trainers_that_cannot_be_used_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, callback: Any = None, **more: Any) -> None:
        trainer = Small(al.RankCallback(**GROW_PRUNE) if callback is None else callback, tmp_path, **more)
        with pytest.raises(AdaptiveLoraError, match=words):
            trainer.train()

    other = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    refused("model has no adapters; required the one that", model=llama())
    refused("model has other adapters; required", model=other)
    refused("got torch.optim.sgd.SGD", optim="sgd")
    refused("got .*Adafactor", optim="adafactor")
    refused("needs at least 2 optimiser steps", max_steps=1)
    refused("with auto_find_batch_size; required", auto_find_batch_size=True)
    twice = al.RankCallback(**GROW_PRUNE)
    refused("callbacks twice; give it once", twice, beside=[twice])
    stale = torch.optim.AdamW(llama().parameters())
    refused("lacks 28 of 28 trained tensors", optimizers=(stale, None))
    late = al.RankCallback(**GROW_PRUNE)

    class Add(TrainerCallback):
        """Adds the callback in the midst of a training."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.add_callback(late)

    trainer = Small(Add(), tmp_path, model=late.attach(llama()))
    with pytest.raises(ConfigError, match=r"was added after training began"):
        trainer.train()
    for kind in ("FSDP", "DEEPSPEED", "MULTI_CPU"):
        state = SimpleNamespace(distributed_type=getattr(DistributedType, kind))
        monkeypatch.setattr("adaptive_lora.runner.rank_callback.AcceleratorState", lambda state=state: state)
        refused(rf"distributed training \({kind}\); required one process")


def test_checkpoints_of_other_trainings_are_refused_by_name(tmp_path: Path) -> None:
    first = Small(al.RankCallback(**GROW_PRUNE), tmp_path / "run", save_strategy="steps", save_steps=10)
    first.train()
    folder = str(tmp_path / "run" / "checkpoint-10")

    def refused(words: str, trainer: Trainer, place: str = folder) -> None:
        with pytest.raises(ConfigError, match=words):
            trainer.train(resume_from_checkpoint=place)

    refused("name is 'grow_prune' there and 'adalora' here", Small(al.RankCallback(**ADALORA), tmp_path))
    other = {**GROW_PRUNE, "budget": "uniform-4", "alpha": 16}
    refused(
        "alpha is 32.0 there and 16.0 here; budget is 'uniform-3' there and 'uniform-4' here",
        Small(al.RankCallback(**other), tmp_path),
    )
    refused("a training of 16 steps, and this one has 30", Small(al.RankCallback(**GROW_PRUNE), tmp_path, max_steps=30))
    refused("training of this RankCallback has ended", first)
    with pytest.raises(ConfigError, match=r"training of this RankCallback has ended"):
        first.train()
    plain = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    Small(TrainerCallback(), tmp_path / "plain", model=plain, save_strategy="steps", save_steps=10).train()
    refused(
        f"has no folder {STATE}", Small(al.RankCallback(**GROW_PRUNE), tmp_path), str(tmp_path / "plain/checkpoint-10")
    )
    (Path(folder) / STATE / "state.json").write_text("{}", encoding="utf-8")
    refused("cannot be read: state.json has SHA-256", Small(al.RankCallback(**GROW_PRUNE), tmp_path))


def test_a_training_is_not_begun_in_the_middle_of_another(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        """Interrupts a training at step 8."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                raise KeyboardInterrupt

    callback = al.RankCallback(**GROW_PRUNE)
    trainer = Small(callback, tmp_path, beside=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(ConfigError, match=r"in the middle of a training that changes ranks"):
        trainer.train()
    al.audit(callback.finish(), callback.plan)


# --- the audit alone


def test_the_audit_stops_a_training_that_is_not_the_planned_one(tmp_path: Path) -> None:
    def trainer(config: Any, **more: Any) -> Trainer:
        return Small(al.AuditCallback(report), tmp_path, model=peft.get_peft_model(llama(), config), **more)

    report = al.plan(llama(), "linear_decay", budget="uniform-3")
    planned = al.lora_config(llama(), "linear_decay", budget="uniform-3")
    trainer(planned, max_steps=2).train()
    uniform = trainer(al.lora_config(llama(), rank=4), max_steps=2)
    with pytest.raises(AdapterError, match=r"its plan: .*parameters are trainable, planned.*rank is 4, planned 5"):
        uniform.train()
    assert uniform.state.global_step == 0
    with pytest.raises(AdapterError, match=r"training did not move B at 14 sites"):
        trainer(planned, max_steps=2, learning_rate=0.0).train()
    with pytest.raises(AdapterError, match=r"has no adapter named 'default'"):
        Small(al.AuditCallback(report), tmp_path, model=llama()).train()
    sharded = peft.get_peft_model(llama(), planned)
    next(p for n, p in sharded.named_parameters() if "lora_A" in n).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match=r"lora_A.* is only in part on this process"):
        Small(al.AuditCallback(report), tmp_path, model=sharded).train()
    with pytest.raises(ConfigError, match=r"required a plan from al.plan, or a RankCallback; got str"):
        al.AuditCallback("linear_decay")  # type: ignore[arg-type]


def test_the_audit_follows_ranks_that_change(tmp_path: Path) -> None:
    class Meddle(TrainerCallback):
        """Changes a factor after the ranks have changed."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 14:
                model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] = 3.0

    callback = al.RankCallback(**GROW_PRUNE)
    trainer = Small(
        callback, tmp_path, beside=[al.AuditCallback(callback), Meddle()], save_strategy="steps", save_steps=8
    )
    with pytest.raises(AdapterError, match=r"layers.0.mlp.up_proj: scale is 3.0, planned"):
        trainer.train()
    assert trainer.state.global_step == 16
