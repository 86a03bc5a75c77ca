"""What a method does during training beside the gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class TrainerCallback(Protocol):
    """Called by the training loop; `NoCallback` does nothing.

    Methods that decide ranks in training (AdaLoRA, grow and prune) change the model here. What they
    need to go on after an interruption is in `state`.
    """

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Take note of the optimiser and of the optimiser steps to come, before the first."""

    def penalty(self) -> torch.Tensor | None:
        """Return what is added to the objective of a step, or None; no reported loss holds it."""

    def stepped(self, step: int, *, taken: bool) -> None:
        """Act after an optimiser step, while its gradients are still there.

        Args:
            step: optimiser steps so far, from 1; micro-batches do not count.
            taken: False where the guard left the step out; its gradients are of no use then.
        """

    def settled(self, step: int) -> bool:
        """Return whether the model has its final ranks: only then may its weights be kept."""

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which `restore` continues."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave; parameters take the shapes of then."""


class NoCallback:
    """No change in training: the gradient step alone."""

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Need nothing."""

    def penalty(self) -> torch.Tensor | None:
        """Add nothing."""
        return None

    def stepped(self, step: int, *, taken: bool) -> None:
        """Change nothing."""

    def settled(self, step: int) -> bool:
        """Be settled always."""
        return True

    def state(self) -> dict[str, Any]:
        """Have none."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have nothing to restore."""
