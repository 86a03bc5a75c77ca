"""Initial weights of LoRA's A and B, as options of every method that trains plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Start(StrEnum):
    """Initial weights of A and B, by PEFT's names for `init_lora_weights`; `default` is PEFT's `true`."""

    DEFAULT = "default"
    """A at random, B zero (Hu et al. 2021, 2106.09685)."""
    PISSA = "pissa"
    """Principal singular vectors of the weight (Meng et al. 2024, 2404.02948)."""
    OLORA = "olora"
    """Columns of Q and rows of R of the weight's QR decomposition (Büyükakyüz 2024, 2406.01775)."""
    CORDA = "corda"
    """Principal singular vectors of the weight times the covariance of its inputs (Yang et al. 2024, 2406.05223)."""
    LOFTQ = "loftq"
    """Principal singular vectors of what a 4-bit base lost in rounding (Li et al. 2023, 2310.08659)."""
    ORTHOGONAL = "orthogonal"
    """Random A and B, none zero, with B·A = 0."""
    EVA = "eva"
    """A from the principal directions of the inputs, B zero (Paischer et al. 2024, 2410.07170)."""
    LORA_GA = "lora_ga"
    """Singular vectors of the gradient of the weight (Wang et al. 2024, 2407.05000)."""

    @property
    def is_subtracted(self) -> bool:
        """Mark of a start whose first B·A is taken out of the weight, so that the base's function is the first."""
        return self in (Start.PISSA, Start.OLORA, Start.CORDA, Start.LORA_GA)

    @property
    def is_measured(self) -> bool:
        """Mark of a start that passes over calibration data are needed for."""
        return self in (Start.CORDA, Start.EVA, Start.LORA_GA)


FULL_BASE_ONLY: Mapping[Start, str] = {
    Start.PISSA: "PiSSA decomposes the weights as saved",
    Start.CORDA: "CorDA decomposes the weights as saved",
    Start.LORA_GA: "LoRA-GA needs the gradient of the weights as saved",
}
"""Start that PEFT refuses on a base in 4 bit -> the reason."""


def start_problems(name: str, method: Any, shared: Mapping[str, Any]) -> list[str]:
    """Return the problems with the initial weights, frozen A, invocation and stored base of a method.

    Args:
        name: name of the method.
        method: the method with its own options.
        shared: options that all methods share and that were given.
    """
    start, packed = Start(shared.get("init", Start.DEFAULT)), shared.get("base", "full") != "full"
    found = []
    if start is not Start.DEFAULT and not method.is_plain_lora:
        found.append(f"{name} starts and trains by a rule of its own, which init={start} would replace; leave init out")
    if packed and method.needs_full_base:
        found.append(f"{name}: {method.needs_full_base}; leave base={shared['base']} out")
    if packed and start in FULL_BASE_ONLY:
        found.append(f"init={start} does not go with base={shared['base']}: {FULL_BASE_ONLY[start]}")
    if start is Start.LOFTQ and not packed:
        found.append("init=loftq starts from what a 4-bit base lost in rounding: required base=nf4, got base=full")
    if shared.get("lora_fa") and shared.get("lora_plus", 1.0) != 1.0:
        found.append("lora_plus is the ratio of B's learning rate to A's, and lora_fa trains no A; leave one out")
    if shared.get("alora") is not None and shared.get("experts"):
        found.append("PEFT has no layers of routed experts that act on some tokens alone; leave alora or experts out")
    if shared.get("alora") is not None and shared.get("dora"):
        found.append("PEFT has no DoRA layers that act on some tokens alone (alora); leave dora or alora out")
    return found
