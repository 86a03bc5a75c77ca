"""Packed rows give what padded batches give: losses, gradients, scores; for every architecture."""

from __future__ import annotations

import contextvars
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, GROUPED
from hypothesis import given
from hypothesis import strategies as st
from test_hybrids import HYBRIDS, save_hybrid

from adaptive_lora.allocation import MethodSpec, allocate
from adaptive_lora.data import TokenizedExample, collate, pack
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.methods.adapters import attach
from adaptive_lora.models.base import gradient_checkpointing
from adaptive_lora.models.kernels import attends_packed, packed_attention, packed_nll, packed_scores, packing_problem
from adaptive_lora.models.kernels.attention import NotPacked, attend, boundary_mask
from adaptive_lora.models.losses import predict, token_losses
from adaptive_lora.models.sites import find_sites

WINDOW = {"sliding_window": 4}
PACKED = {
    "gpt2": {}, "pythia": {}, "opt": {}, "llama": {}, "mistral": WINDOW, "qwen2": {}, "qwen3": {},
    "gemma": {}, "gemma2": WINDOW, "gemma3": {**WINDOW, "sliding_window_pattern": 2}, "phi": {},
    "phi3": WINDOW,
}  # fmt: skip
SCALED = {"cohere": "CohereConfig", "granite": "GraniteConfig"}
NO_DROPOUT = (
    "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_dropout", "hidden_dropout",
)  # fmt: skip
ALIBI = ("bloom", "falcon")


def build(name: str) -> Any:
    """Return a tiny causal model with weights large enough for attention to matter."""
    if name in SCALED:
        kind, settings = SCALED[name], {**GROUPED, "pad_token_id": 0}
    else:
        kind, common, _ = ARCHITECTURES[name]
        settings = {**common, **PACKED.get(name, {})}
    settings = {**settings, "bos_token_id": 1, "eos_token_id": 2}
    off = {key: 0.0 for key in NO_DROPOUT if hasattr(getattr(transformers, kind)(), key)}
    settings.update(off)
    if name == "granite":
        settings["logits_scaling"] = 3.0
    config = getattr(transformers, kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.3)
    return model.requires_grad_(False)


def adapted(name: str) -> Any:
    """Return such a model with adapters that do something."""
    model = build(name)
    sites = find_sites(model)
    plan = allocate(MethodSpec.build("uniform", {"rank": 2}), sites, alpha=4.0)
    found = attach(model, plan, seed=0, dropout=0.0).double()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for key, parameter in found.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.3)
    return found.train()


def examples(lengths: list[tuple[int, int]]) -> list[TokenizedExample]:
    """Return examples of (tokens, index of the first supervised token)."""
    draw = torch.Generator().manual_seed(0)
    return [
        TokenizedExample(
            id=str(index),
            input_ids=tuple(torch.randint(3, 99, (count,), generator=draw).tolist()),
            first_label=first,
            prompt_length=first,
            response="",
        )
        for index, (count, first) in enumerate(lengths)
    ]


BATCH = [(9, 3), (4, 1), (13, 12), (2, 1), (7, 5)]


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("name", [*PACKED, *SCALED])
def test_a_packed_row_gives_the_padded_losses_and_gradients(name: str) -> None:
    model, batch = adapted(name), examples(BATCH)
    assert packing_problem(model) is None
    # float64 masks overflow in Gemma 2's own attention where a window holds padding alone
    groups = [[one] for one in batch] if name == "gemma2" else [batch]
    plain = [predict(model, collate(group, pad_id=0)) for group in groups]
    wanted = torch.cat([token_losses(each.logits, each.targets)[each.supervised] for each in plain]).double()
    right = torch.cat([(each.logits.argmax(dim=-1) == each.targets)[each.supervised] for each in plain])
    with packed_attention(model):
        nll, _ = packed_nll(model, pack(batch))
        found = gradients(model, nll.sum())
        model.eval()
        scores = packed_scores(model, pack(batch))
    torch.testing.assert_close(nll.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found, gradients(model, wanted.sum()), rtol=5e-5, atol=5e-6)  # sums in another order
    torch.testing.assert_close(scores.nll, nll.detach())
    assert scores.correct.tolist() == right.tolist()
    assert scores.owners.tolist() == [0] * 6 + [1] * 3 + [2] + [3] + [4] * 2


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_gradient_checkpointing_recomputes_within_the_sequences(name: str) -> None:
    model, batch = adapted(name), pack(examples(BATCH))
    with packed_attention(model):
        wanted = gradients(model, packed_nll(model, batch)[0].sum())
        with gradient_checkpointing(model.get_base_model(), True):
            found = gradients(model, packed_nll(model, batch)[0].sum())
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ALIBI)
def test_what_cannot_pack_is_known(name: str) -> None:
    assert packing_problem(build(name)) == "its attention takes no function from outside"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HYBRIDS)
def test_what_mixes_positions_beside_attention_is_padded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A short convolution leaks less than roundings allow for; what depends on what tells it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(save_hybrid(name, tmp_path), dtype=dtype).requires_grad_(
        False
    )
    problem = packing_problem(model)
    assert problem is not None
    if name == "lfm2":
        assert "mixes a row's sequences" in problem
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_window_that_attention_does_not_hear_of_is_noticed() -> None:
    model = build("mistral")
    for module in model.modules():
        if type(module).__name__ == "MistralAttention":
            module.config = copy.copy(model.config)
            module.config.sliding_window = None
    assert "window" in str(packing_problem(model))


def test_other_logits_than_the_models_own_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("granite")
    monkeypatch.setattr(type(model), "forward", _twice(type(model).forward))
    assert "other logits" in str(packing_problem(model))


def _twice(forward: Any) -> Any:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found

    return doubled


def padded_losses(model: Any, batch: Any) -> torch.Tensor:
    found = predict(model, batch)
    return token_losses(found.logits, found.targets)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_padded_batch_in_between_is_as_ever(name: str) -> None:
    model, batch = build(name).float(), collate(examples(BATCH), pad_id=0)
    usual = model.config._attn_implementation
    before = padded_losses(model, batch)
    with packed_attention(model):
        torch.testing.assert_close(padded_losses(model, batch), before, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == usual
    assert torch.equal(padded_losses(model, batch), before)


def test_attention_refuses_what_it_cannot_do() -> None:
    q = torch.randn(1, 2, 5, 4)
    layer = torch.nn.Identity()
    bounds = boundary_mask([0, 2, 5])
    with pytest.raises(NotPacked, match="causal"):
        attend(layer, q, q, q, bounds, is_causal=False)
    with pytest.raises(NotPacked, match="s_aux"):
        attend(layer, q, q, q, bounds, s_aux=torch.zeros(2))
    with pytest.raises(NotPacked, match="cache"):
        attend(layer, q[:, :, :2], q, q, bounds)


lengths = st.lists(
    st.integers(2, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
    min_size=1, max_size=6,
)  # fmt: skip


@given(lengths)
def test_a_packed_batch_holds_what_the_padded_one_holds(shape: list[tuple[int, int]]) -> None:
    batch = examples(shape)
    packed, padded = pack(batch), collate(batch, pad_id=0)
    seen = padded.attention_mask.bool()
    assert packed.lengths == tuple(count for count, _ in shape)
    assert packed.boundaries[-1] == packed.tokens == padded.tokens
    assert packed.supervised_tokens == padded.supervised_tokens
    assert torch.equal(packed.input_ids[0], padded.input_ids[seen])
    following = torch.nn.functional.pad(padded.labels[:, 1:], (0, 1), value=IGNORED)
    assert torch.equal(packed.targets, following[seen])
    assert torch.equal(packed.owners, seen.nonzero()[:, 0])
    assert torch.equal(packed.position_ids[0], seen.nonzero()[:, 1])


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    model, other = build("llama"), contextvars.Context()
    one, two = packed_attention(model), packed_attention(model)
    one.__enter__()
    assert not other.run(attends_packed, model)
    other.run(two.__enter__)
    one.__exit__(None, None, None)
    assert not attends_packed(model)
    assert other.run(attends_packed, model)
    assert model.config._attn_implementation != "sdpa"
    other.run(two.__exit__, None, None, None)
    assert model.config._attn_implementation == "sdpa"
