"""Ranks that change in training, in transformers' `Trainer` and those built on it, such as TRL's `SFTTrainer`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel

from adaptive_lora.allocation import RankPlan
from adaptive_lora.errors import AdapterError, ConfigError, ModelError
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adapters.attach import ADAPTER
from adaptive_lora.methods.adapters.dropout import set_dropout_step
from adaptive_lora.methods.base import RankEvent
from adaptive_lora.methods.grow_prune import GrowPrune
from adaptive_lora.methods.grow_prune.fit import GrowPruneCallback
from adaptive_lora.methods.grow_prune.resize import adam_of
from adaptive_lora.methods.importance.own_batches import require_base
from adaptive_lora.methods.ranks_in_training import RankChanges
from adaptive_lora.runner.changing_adapter import ChangingAdapter
from adaptive_lora.runner.own_model import PLAN_SETTINGS, plan, plan_request
from adaptive_lora.training.checkpoint_files import CorruptCheckpoint, read_checkpoint, write_checkpoint

STATE = "adaptive_lora_ranks"
"""Folder in a checkpoint of the trainer: trained tensors, ranks, and what decides the next ones."""
_ENDED = (
    "the training of this RankCallback has ended, and its model is plain LoRA; for another training, attach a new "
    "RankCallback to the base (model.unload())."
)
_log = logging.getLogger(__name__)


class RankCallback(transformers.TrainerCallback):
    """`grow_prune`, or AdaLoRA with a budget of parameters, as a callback of a `Trainer`.

    `attach` gives the model for the trainer. While it trains, ranks change between a warm-up and a final part of the
    steps, and remaining components keep Adam's moments. Checkpoints of the trainer hold the state of the ranks, from
    which `resume_from_checkpoint` continues bit for bit. When training ends, the trainer's model is plain LoRA with the
    final ranks, and saves as a stock PEFT adapter.
    """

    def __init__(self, method: str = "grow_prune", *, dropout: float = 0.0, seed: int = 0, **options: Any) -> None:
        """Choose the method.

        Args:
            method: `grow_prune` or `adalora`, or `NAME:option=value,...` as on the command line.
            dropout: dropout probability of LoRA's inputs.
            seed: seed of initial weights, of components that are added, and of dropout's masks.
            **options: options of the method, such as `budget="uniform-8"` or `interval=50`, and `alpha` (32) and
                `scaling` (`standard`, `rslora` or `constant`).

        Raises:
            ConfigError: another method, an unknown option, or a value out of limits.
        """
        if unused := sorted(set(options) & set(PLAN_SETTINGS) - {"alpha", "scaling"}):
            raise ConfigError(f"{', '.join(unused)} is set in the model or in TrainingArguments; leave it out here.")
        self._config, self._spec = plan_request(method, options)
        if not isinstance(self._spec.options, GrowPrune | AdaLora):
            raise ConfigError(f"required grow_prune or adalora, whose ranks change in training; got {self._spec.name}.")
        if self._spec.lora_plus != 1:
            raise ConfigError("lora_plus is a learning rate for B, which a Trainer's optimiser lacks; leave it out.")
        if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
            raise ConfigError(f"dropout must be a number of at least 0 and below 1; got {dropout!r}.")
        self._given = (method, options)
        self._dropout, self._seed = dropout, seed
        self._attached: ChangingAdapter | None = None

    def attach(self, model: Any) -> PeftModel:
        """Return a PEFT model at the starting ranks, for the trainer.

        Args:
            model: transformers model without adapters, on one device.

        Raises:
            ConfigError: an option does not fit the model.
            ModelError: the model has adapters already, no adapter sites, or is on several devices.
            AllocationError: the budget does not fit the model.
        """
        require_base(model)
        devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
        if len(devices) > 1:
            raise ModelError(f"the model is on {', '.join(devices)}; required one device, such as device_map=0.")
        method, options = self._given
        report = plan(model, method, seed=self._seed, **options)
        self._attached = ChangingAdapter(model, report, seed=self._seed, dropout=self._dropout)
        self._state: Any = None
        """The trainer's state object of the training that began last."""
        self._steps: int | None = None
        """Number of steps of the training that a loaded checkpoint is of."""
        self._passes = 0
        """Number of micro-batches so far, which selects dropout's masks."""
        self._ended = False
        adapted: Any = self._attached.model
        self._save_stock, self._load_stock = adapted.save_pretrained, adapted.load_adapter
        adapted.save_pretrained, adapted.load_adapter = self._save, self._load
        found: PeftModel = adapted
        return found

    @property
    def plan(self) -> RankPlan:
        """Plan of the adapter at its present ranks; AdaLoRA's is above the budget until the last change.

        Raises:
            AdapterError: no model is attached.
        """
        return self._adapter.plan

    @property
    def history(self) -> tuple[RankEvent, ...]:
        """Ranks from each change on, from step 0.

        Raises:
            AdapterError: no model is attached.
        """
        return tuple(self._adapter.changes.history)

    @property
    def _adapter(self) -> ChangingAdapter:
        if self._attached is None:
            raise AdapterError("RankCallback has no model yet; give the trainer the one that its attach(base) returns.")
        return self._attached

    def audit(self) -> None:
        """Compare the model with the plan of its present ranks.

        Raises:
            AdapterError: there are differences, or no model is attached; the message lists all differences.
        """
        self._adapter.audit()

    def finish(self) -> PeftModel:
        """Make the trainer's model plain LoRA of its present ranks, with the same function, and return it.

        This happens by itself when training ends; after an interruption it can be called by hand.

        Raises:
            AdapterError: nothing was trained, or training did not reach a site.
        """
        adapter = self._adapter
        if self._state is None:
            raise AdapterError("nothing was trained; give the callback and its model to a Trainer, and train.")
        if not self._ended:
            step, settle = self._state.global_step, adapter.changes.phases.settle
            if step < settle:
                _log.warning(
                    f"training ended at step {step}, before the last change of ranks at step {settle}; the adapter has "
                    f"{adapter.plan.trainable_parameters:,} parameters, its budget is {adapter.budget:,}."
                )
            self._ended = True
            del adapter.model.save_pretrained
        return adapter.end()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note an optimiser that the trainer was given: a checkpoint is loaded before training begins."""
        if self._attached and isinstance(self._attached.changes, GrowPruneCallback) and kwargs.get("optimizer"):
            self._attached.changes.optimizer = adam_of(kwargs["optimizer"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the phases by the number of steps.

        Raises:
            ConfigError: the model, the optimiser or the trainer's arguments cannot be used.
            AllocationError: the training has a single step.
        """
        model = kwargs["model"]
        if self._attached is None or model is not self._attached.model:
            found = "has other adapters" if hasattr(model, "peft_config") else "has no adapters"
            raise ConfigError(f"the trainer's model {found}; required the one that RankCallback.attach(base) returns.")
        self._require_first_or_resumed(state)
        _require_supported(args)
        optimizer = adam_of(kwargs["optimizer"])
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if lacking := sum(id(parameter) not in held for parameter in trained):
            raise ConfigError(
                f"the optimiser lacks {lacking} of {len(trained)} trained tensors; required one of the parameters of "
                "the model that RankCallback.attach(base) returns, or none, so that the trainer makes it."
            )
        self._attached.changes.start(optimizer, state.max_steps)
        self._state, self._steps = state, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Select dropout's masks, and add the gradient of the method's penalty."""
        changes = self._changes(state)
        set_dropout_step(self._adapter.model, self._passes)
        penalty = changes.penalty()
        if penalty is not None:
            scaler = getattr(kwargs["optimizer"], "scaler", None)
            (penalty if scaler is None else scaler.scale(penalty)).backward()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Select dropout's masks of the next micro-batch."""
        self._passes += 1
        set_dropout_step(self._adapter.model, self._passes)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and move ranks after the step, while its gradients are there."""
        self._passes += 1
        skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        self._changes(state).stepped(state.global_step + 1, taken=not skipped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a best checkpoint from before the last change: its ranks are not final."""
        if state.global_step == self._changes(state).phases.settle:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the model plain LoRA."""
        self.finish()

    def _changes(self, state: Any) -> RankChanges:
        """Return the method's state in a training that began with this callback.

        Raises:
            ConfigError: the training began without it.
        """
        if self._attached is None or self._state is not state:
            raise ConfigError(
                "RankCallback was added after training began; give it in callbacks=, or to add_callback before train()."
            )
        return self._attached.changes

    def _save(self, save_directory: Any, *args: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the adapter as PEFT does, and beside it what resuming needs."""
        with self._adapter.described():
            self._save_stock(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if self._state is not None and is_main_process:
            training = {"method": self._identity(), "steps": self._state.max_steps, "passes": self._passes}
            write_checkpoint(Path(save_directory) / STATE, {**training, **self._adapter.state()})

    def _load(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of the trainer into the model, whatever ranks it has now.

        Raises:
            ConfigError: the checkpoint was written without this callback or by another method, or training has ended.
        """
        folder = Path(model_id) / STATE
        if adapter_name != ADAPTER or (self._ended and not folder.is_dir()):
            return self._load_stock(model_id, adapter_name, *args, **kwargs)
        if self._ended:
            raise ConfigError(_ENDED)
        if not folder.is_dir():
            raise ConfigError(
                f"{model_id} has no folder {STATE}, so that it was written without RankCallback; continue from a "
                "checkpoint that was written with it, or start anew."
            )
        try:
            state = read_checkpoint(folder)
        except CorruptCheckpoint as error:
            raise ConfigError(f"{folder} cannot be read: {error}. Continue from another checkpoint.") from error
        there, here = state["method"], self._identity()
        if other := [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]:
            what = "; ".join(
                f"{name} is {there.get(name)!r:.60} there and {here.get(name)!r:.60} here" for name in other
            )
            raise ConfigError(f"{model_id} is of another training: {what}. Give the same options, or start anew.")
        self._adapter.restore(state)
        self._passes, self._steps = state["passes"], state["steps"]
        return None

    def _identity(self) -> Mapping[str, Any]:
        """Return what all checkpoints of a training have in common, by the name of the option."""
        return {
            "alpha": self._config.train.alpha,
            "scaling": str(self._config.train.scaling),
            **self._spec.to_dict(),
            "dropout": self._dropout,
            "seed": self._seed,
            "number of parameters": self._adapter.budget,
            "sites": self._adapter.sites,
        }

    def _require_first_or_resumed(self, state: Any) -> None:
        """Raise ConfigError if a training would begin in the middle, or at the end, of another."""
        if self._ended:
            raise ConfigError(_ENDED)
        if self._state is state:
            raise ConfigError("RankCallback is among the trainer's callbacks twice; give it once.")
        if self._steps is None and (self._state is not None or state.global_step):
            raise ConfigError(
                "the model is in the middle of a training that changes ranks; continue it with resume_from_checkpoint, "
                "or attach a new RankCallback to the base (model.unload())."
            )
        if self._steps not in (None, state.max_steps):
            raise ConfigError(
                f"the checkpoint is of a training of {self._steps} steps, and this one has {state.max_steps}; ranks "
                "follow a schedule over all steps. Give the same epochs or max_steps, batch size and data."
            )


def _require_supported(args: Any) -> None:
    """Raise ConfigError for ways to train in which ranks cannot change."""
    kind = AcceleratorState().distributed_type
    refused = {
        f"distributed training ({kind.value})": kind != DistributedType.NO,
        f"DataParallel over {args.n_gpu} GPUs": args.n_gpu > 1,
        "torch_compile": args.torch_compile,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    if found := [what for what, used in refused.items() if used]:
        raise ConfigError(
            f"RankCallback does not work with {' and '.join(found)}; required one process on one device, not compiled, "
            "with a batch size that is given."
        )
