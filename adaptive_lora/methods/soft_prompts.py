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
from adaptive_lora.methods.base import TunerMethod, largest
from adaptive_lora.options import Limits, option

_TOKENS = 20
"""Number of virtual tokens where neither the method nor a budget gives one."""
_EMBEDDING = "prompt_encoder.default.embedding.weight"
_COUNT = Limits(low=1)


@dataclass(frozen=True, kw_only=True)
class _OfTokens(TunerMethod):
    """A tuner whose size is its number of virtual tokens."""

    tokens: int | None = option(
        None, f"number of virtual tokens; none: the most within the budget, or {_TOKENS}", limits=_COUNT
    )

    def label_under(self, budget: str | None) -> str:
        """Return `n20`."""
        if self.tokens is None and budget is not None:
            return ""
        return f"n{self.tokens or _TOKENS}"

    def token_parameters(self, sizes: Decoder) -> int:
        """Return the number of parameters of a virtual token."""
        raise NotImplementedError

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the parameters of the virtual tokens."""
        sizes = _decoder(base, method, self.name)
        each = self.token_parameters(sizes)
        tokens, notes = self.tokens or _TOKENS, tuple[str, ...]()
        if self.tokens is None and budget is not None:
            tokens, notes = _most_tokens(each, budget, sizes)
        return _plan(self, tokens, {_EMBEDDING: (tokens, each)}, sizes, budget, method, notes=notes)


@dataclass(frozen=True, kw_only=True)
class PromptTuning(_OfTokens):
    """Prompt tuning (Lester et al. 2021, 2104.08691): embeddings of virtual tokens.

    They start as embeddings of tokens drawn from the vocabulary (section 3.2).
    """

    name: ClassVar[str] = "prompt_tuning"

    def token_parameters(self, sizes: Decoder) -> int:
        """Return the width of an embedding."""
        return sizes.width


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(_OfTokens):
    """Prefix tuning (Li and Liang 2021, 2101.00190): keys and values of virtual tokens, per layer.

    Without the paper's reparametrisation, which is discarded after training. Keys and values start
    small, so that at first they only take some of the attention.
    """

    name: ClassVar[str] = "prefix_tuning"
    divided_base: ClassVar[bool] = True

    def token_parameters(self, sizes: Decoder) -> int:
        """Return the size of one key and one value per layer and head of keys and values."""
        return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim


@dataclass(frozen=True, kw_only=True)
class PTuning(TunerMethod):
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
        sizes = _decoder(base, method, self.name)
        width, tokens = sizes.width, self.tokens

        def cost(hidden: int) -> int:
            return tokens * width + hidden * (2 * width + hidden + 2) + width

        hidden = width if self.encoder_width is None else self.encoder_width
        if self.encoder_width is None and budget is not None:
            hidden = largest(cost, budget, f"unit of the encoder of {tokens} tokens")
        kept: dict[str, Shape] = {_EMBEDDING: (tokens, width)}
        tensors = dict(kept)
        for layer, outputs, inputs in ((0, hidden, width), (2, hidden, hidden), (4, width, hidden)):
            name = f"prompt_encoder.default.mlp_head.{layer}"
            tensors |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        return _plan(self, tokens, tensors, sizes, budget, method, kept=kept, encoder_width=hidden)


def _decoder(base: Architecture, method: str, family: str) -> Decoder:
    sizes = base.decoder
    if sizes is None:
        raise AllocationError(f"{method}: {base.kind} takes no virtual tokens; required a causal language model.")
    if reason := sizes.no_prefix if family == PrefixTuning.name else sizes.no_embeddings:
        raise AllocationError(
            f"{method}: {base.kind} takes no such virtual tokens, because {reason}; use adapters of its linear layers."
        )
    return sizes


def _most_tokens(each: int, budget: int, sizes: Decoder) -> tuple[int, tuple[str, ...]]:
    """Return the most virtual tokens of `each` parameters within the budget, and remarks on them."""
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
    options: TunerMethod,
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
    found = {name: getattr(sizes, name) for name in ("width", "layers", "kv_heads", "head_dim")}
    return TunerPlan(
        method=method,
        family=options.name,
        settings={"tokens": tokens, **found, **settings},
        tensors=tensors,
        budget=budget,
        kept=kept,
        positions=tokens,
        notes=notes,
    )
