"""Tuners that train a prefix or virtual tokens before the input.

They use positions of the context, cannot be packed, and except for P-tuning need a learning rate 10
to 100 times that of LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from adaptive_lora.allocation.architecture import Architecture, Decoder, Shape
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TrainedTrial, TrialContext, TunerMethod
from adaptive_lora.methods.size_parameter import largest, within
from adaptive_lora.options import Limits, option

_TOKENS = 20
"""Number of virtual tokens where neither the method nor a budget gives one."""
_EMBEDDING = "prompt_encoder.default.embedding.weight"
_COUNT = Limits(low=1)


@dataclass(frozen=True, kw_only=True)
class _SoftPrompt(TunerMethod):
    """A tuner of virtual tokens, trained by PEFT."""

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train with PEFT's own tuner."""
        from adaptive_lora.methods.adapters.peft_tuner import fit_peft_tuner

        return fit_peft_tuner(trial)


@dataclass(frozen=True, kw_only=True)
class _OfTokens(_SoftPrompt):
    """A tuner whose size is its number of virtual tokens."""

    tokens: int | None = option(
        None, f"number of virtual tokens; none: the most within the budget, or {_TOKENS}", limits=_COUNT
    )

    def label_under(self, budget: str | None) -> str:
        """Return `n20`."""
        if self.tokens is None and budget is not None:
            return ""
        return f"n{_TOKENS if self.tokens is None else self.tokens}"


@dataclass(frozen=True, kw_only=True)
class PromptTuning(_OfTokens):
    """Prompt tuning (Lester et al. 2021, 2104.08691): embeddings of virtual tokens.

    They start as embeddings of tokens drawn from the vocabulary (section 3.2).
    """

    name: ClassVar[str] = "prompt_tuning"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return tokens x width embeddings."""
        sizes = _decoder(base, method)
        tokens, notes = _tokens(self.tokens, sizes.width, budget, sizes)
        tensors = {_EMBEDDING: (tokens, sizes.width)}
        return _plan("prompt_tuning", tokens, tensors, sizes, budget, method, notes=notes)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(_OfTokens):
    """Prefix tuning (Li and Liang 2021, 2101.00190): keys and values of virtual tokens, per layer.

    Without the paper's reparametrisation, which is discarded after training. Keys and values start
    small, so that at first they only take some of the attention.
    """

    name: ClassVar[str] = "prefix_tuning"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return one key and one value per token, layer and head of keys and values."""
        sizes = _decoder(base, method)
        each = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
        tokens, notes = _tokens(self.tokens, each, budget, sizes)
        tensors = {_EMBEDDING: (tokens, each)}
        return _plan("prefix_tuning", tokens, tensors, sizes, budget, method, notes=notes)


@dataclass(frozen=True, kw_only=True)
class PTuning(_SoftPrompt):
    """P-tuning (Liu et al. 2021, 2103.10385): virtual tokens computed by a small encoder.

    The encoder is PEFT's: an embedding and a perceptron of two hidden layers. Its parameters are
    trained and counted; the adapter has the embeddings that it computes.
    """

    name: ClassVar[str] = "p_tuning"
    tokens: int = option(_TOKENS, "number of virtual tokens", limits=_COUNT)
    encoder_width: int | None = option(
        None, "width of the encoder's hidden layers; none: the largest within the budget, or the base's", limits=_COUNT
    )

    def label_under(self, budget: str | None) -> str:
        """Return `n20` and, where it is given, `w64`."""
        width = f"-w{self.encoder_width}" if self.encoder_width is not None else ""
        return f"n{self.tokens}{width}"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the embedding and the three linear layers of the encoder."""
        sizes = _decoder(base, method)
        width, tokens = sizes.width, self.tokens

        def cost(hidden: int) -> int:
            return tokens * width + hidden * (2 * width + hidden + 2) + width

        if self.encoder_width is not None:
            hidden = self.encoder_width
        elif budget is None:
            hidden = width
        else:
            hidden = largest(cost, budget, f"unit of the encoder of {tokens} tokens")
        tensors: dict[str, Shape] = {_EMBEDDING: (tokens, width)}
        sides = ((0, hidden, width), (2, hidden, hidden), (4, width, hidden))
        for layer, outputs, inputs in sides:
            name = f"prompt_encoder.default.mlp_head.{layer}"
            tensors |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        return _plan(
            "p_tuning", tokens, tensors, sizes, budget, method,
            kept={_EMBEDDING: (tokens, width)}, encoder_width=hidden,
        )  # fmt: skip


def _decoder(base: Architecture, method: str) -> Decoder:
    if base.decoder is None:
        raise AllocationError(f"{method}: {base.kind} takes no virtual tokens; required a causal language model.")
    return base.decoder


def _tokens(given: int | None, each: int, budget: int | None, sizes: Decoder) -> tuple[int, tuple[str, ...]]:
    """Return the number of virtual tokens of `each` parameters, and remarks on it."""
    if given is not None or budget is None:
        return _TOKENS if given is None else given, ()
    most = largest(lambda tokens: tokens * each, budget, "virtual token")
    if sizes.max_positions is None or most <= sizes.max_positions // 2:
        return most, ()
    tokens = max(1, sizes.max_positions // 2)
    return tokens, (
        f"The budget holds {most:,} virtual tokens, but at most half of the base's "
        f"{sizes.max_positions:,} positions are taken: of {budget:,} parameters "
        f"{tokens * each:,} are used, the nearest below.",
    )


def _plan(
    family: str,
    tokens: int,
    tensors: Mapping[str, Shape],
    sizes: Decoder,
    budget: int | None,
    method: str,
    *,
    kept: Mapping[str, Shape] | None = None,
    notes: tuple[str, ...] = (),
    **settings: Any,
) -> TunerPlan:
    if sizes.max_positions is not None and tokens >= sizes.max_positions:
        raise AllocationError(
            f"{method}: {tokens:,} virtual tokens leave no room in the base's "
            f"{sizes.max_positions:,} positions; required fewer."
        )
    plan = TunerPlan(
        method=method,
        family=family,
        settings={
            "tokens": tokens,
            "width": sizes.width,
            "layers": sizes.layers,
            "kv_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            **settings,
        },
        tensors=tensors,
        budget=budget,
        kept=kept,
        positions=tokens,
        notes=notes,
    )
    within(plan.trainable_parameters, budget, method)
    return plan
