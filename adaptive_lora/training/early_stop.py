"""Early stopping: keep the weights of the best validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


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
