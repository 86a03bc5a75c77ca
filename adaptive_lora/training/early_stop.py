"""Early stopping: keep the weights of the best validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class EarlyStop:
    """Watches validation losses; with a patience of 0 it only remembers the last one."""

    def __init__(self, patience: int, parameters: Sequence[nn.Parameter]) -> None:
        """Stop after `patience` validations in a row without improvement; 0: never."""
        self.kept_loss = math.nan
        self.stop = False
        self._patience, self._parameters = patience, parameters
        self._best: list[torch.Tensor] = []
        self._without_gain = 0

    def see(self, loss: float) -> None:
        """Take note of a validation loss; sets `stop` when patience is used up."""
        if not self._patience:
            self.kept_loss = loss
        elif not self._best or loss < self.kept_loss:
            self.kept_loss, self._without_gain = loss, 0
            self._best = [parameter.detach().clone() for parameter in self._parameters]
        else:
            self._without_gain += 1
            self.stop = self._without_gain >= self._patience

    def restore_best(self) -> None:
        """Put back the weights of the best validation, where early stopping is on."""
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=False):
                parameter.copy_(best)
