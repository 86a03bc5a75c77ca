"""Callbacks of the training loop: actions of a method in addition to the gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class TrainerCallback:
    """Called by the training loop. This class does nothing, as plain LoRA needs.

    Methods that decide ranks in training (AdaLoRA, grow and prune) change the model here. `state`
    holds what they need to continue after an interruption.
    """

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Receive the optimiser and the number of optimiser steps, before the first step."""

    def penalty(self) -> torch.Tensor | None:
        """Return a term added to the objective of a step, or None; reported losses exclude it."""
        return None

    def stepped(self, step: int, *, taken: bool) -> None:
        """Act after an optimiser step, before its gradients are cleared.

        Args:
            step: number of optimiser steps so far, from 1; micro-batches do not count.
            taken: False where the guard skipped the step; its gradients are then invalid.
        """

    def settled(self, step: int) -> bool:
        """Return whether the model has its final ranks; only then can its weights be kept as the best."""
        return True

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which `restore` continues."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a value of `state`; parameters get the shapes that they had then."""
