"""The audit of an adapter as built, in transformers' `Trainer` and those built on it."""

from __future__ import annotations

from typing import Any

import transformers

from adaptive_lora.allocation import RankPlan
from adaptive_lora.errors import AdapterError, ConfigError
from adaptive_lora.methods.adapters.audit import audit_moved
from adaptive_lora.runner.own_model import audit
from adaptive_lora.runner.plan import PlanReport
from adaptive_lora.runner.rank_callback import RankCallback


class AuditCallback(transformers.TrainerCallback):
    """Stops a LoRA training whose model is not the planned one, before its first step and at its end.

    Every rank, alpha, factor and shape is read back from the trainer's model and compared with the plan; no other
    parameter may be trained. Checkpoints and the end are audited too, and at the end every site must have moved.
    """

    def __init__(self, plan: RankPlan | PlanReport | RankCallback) -> None:
        """Choose the plan.

        Args:
            plan: plan of `al.plan` or `al.allocate`, or the trainer's `RankCallback`, whose present ranks are the plan.

        Raises:
            ConfigError: it is none of these.
        """
        if not isinstance(plan, RankPlan | PlanReport | RankCallback):
            raise ConfigError(f"required a plan from al.plan, or a RankCallback; got {type(plan).__name__}.")
        self._plan = plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit the model before the first step.

        Raises:
            AdapterError: there are differences; the message lists all of them.
        """
        self._audit(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit the model of a checkpoint."""
        self._audit(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit the trained model."""
        self._audit(kwargs["model"])
        if not isinstance(self._plan, RankCallback):  # its own end checks that
            audit_moved(kwargs["model"])

    def _audit(self, model: Any) -> None:
        for name, weight in model.named_parameters():
            if "lora_" in name and (hasattr(weight, "ds_id") or type(weight).__name__ in ("DTensor", "FlatParameter")):
                raise AdapterError(
                    f"{name} is only in part on this process (FSDP or DeepSpeed); audit before, al.audit."
                )
        if isinstance(self._plan, RankCallback):
            self._plan.audit()
        else:
            audit(model, self._plan)
