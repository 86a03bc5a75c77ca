"""Ends of a training before its last step: too many non-finite steps, or no further improvement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.errors import TrialFailed


class StabilityGuard:
    """Counts optimiser steps skipped because loss or gradient was not finite."""

    def __init__(self, max_skipped_steps: int, *, gradient_scaler: bool = False) -> None:
        """Allow this many skipped steps; one more fails the trial.

        A gradient scaler starts at 2^16 and halves at each overflow, so up to 16 further skipped
        steps are its normal search for a scale and are allowed.
        """
        self.skipped = 0
        self.gradient_scaler = gradient_scaler
        self._limit = max_skipped_steps + (16 if gradient_scaler else 0)

    def allows(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Return whether the step may be taken.

        Args:
            step: optimiser step, from 1.
            loss: loss of the step, in nats per supervised token.
            gradient_norm: norm over all trainable parameters, before clipping.

        Raises:
            TrialFailed: the limit of skipped steps was exceeded.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            return True
        self.skipped += 1
        if self.skipped > self._limit:
            raise TrialFailed(
                f"non-finite at step {step} (loss {loss:g}, gradient norm {gradient_norm:g}); "
                f"{self.skipped} steps skipped, {self._limit} allowed. Lower the learning rate or "
                "use precision bf16 or fp32."
            )
        return False


class EarlyStop:
    """Tracks validation losses; with a patience of 0 it only keeps the last one."""

    def __init__(self, patience: int) -> None:
        """Stop after `patience` consecutive validations without improvement; 0: never."""
        self.kept_loss = math.nan
        self.stop = False
        self._patience = patience
        self._best: list[torch.Tensor] = []
        self._without_gain = 0

    def see(self, loss: float, parameters: Sequence[nn.Parameter]) -> None:
        """Record a validation loss; sets `stop` when patience is used up."""
        if not self._patience:
            self.kept_loss = loss
        elif not self._best or loss < self.kept_loss:
            self.kept_loss, self._without_gain = loss, 0
            self._best = [parameter.detach().clone() for parameter in parameters]
        else:
            self._without_gain += 1
            self.stop = self._without_gain >= self._patience

    def restore_best(self, parameters: Sequence[nn.Parameter]) -> None:
        """Restore the weights of the best validation, if early stopping is on."""
        if not self._best:
            return
        with torch.no_grad():
            for parameter, best in zip(parameters, self._best, strict=True):
                parameter.copy_(best)

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which `restore` continues."""
        return {
            "kept_loss": self.kept_loss,
            "best": [tensor.clone() for tensor in self._best],
            "without_gain": self._without_gain,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a value of `state`."""
        self.kept_loss, self._without_gain = state["kept_loss"], state["without_gain"]
        self._best = [tensor.clone() for tensor in state["best"]]
        self.stop = bool(self._patience) and self._without_gain >= self._patience
