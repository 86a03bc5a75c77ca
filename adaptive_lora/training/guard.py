"""The stability guard: skips and counts non-finite steps, and fails the trial after too many."""

from __future__ import annotations

import math

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
