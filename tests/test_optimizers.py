"""Optimisers whose moments follow a layer's components when its rank changes; all others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.grow_prune.resize import NewRank, adam_of, resize

KEPT = [0, 2, 5, 6]
CHANGE = NewRank(kept=KEPT, new_a=torch.full((3, 300), 0.1), alpha=7.0, scale=2.0)
"""Four of eight components remain and three are new; the scale doubles, so that B is halved."""


def optimizer_of(name: str, groups: list[dict[str, Any]]) -> Any:
    """Return an optimiser of torch or bitsandbytes; with 8 bit from 1,000 values on."""
    if name.startswith("bnb."):
        bnb = pytest.importorskip("bitsandbytes")
        return getattr(bnb.optim, name.removeprefix("bnb."))(groups, lr=1e-2, min_8bit_size=1000)
    kind = torch.optim.Adam if name == "Adam" else torch.optim.AdamW
    return kind(groups, lr=1e-2, **({} if name == "Adam" else {name: True}))


class Trained:
    """A LoRA layer after three steps, with A and B in groups of their own."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(300, 130))
        self.model: Any = get_peft_model(base, LoraConfig(target_modules=["0"], r=8, lora_alpha=8))
        self.layer = lora_layers(self.model)["0"]
        self.data, self.name = torch.randn(16, 300), name
        self.optimizer = optimizer_of(name, self.groups)
        for _ in range(3):
            self.step()

    @property
    def weights(self) -> list[nn.Parameter]:
        """A and B as they are now."""
        return [self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """A with weight decay, B without."""
        return [{"params": [w], "weight_decay": decay} for w, decay in zip(self.weights, (0.1, 0.0), strict=True)]

    def step(self) -> None:
        """Take a step."""
        self.model(self.data).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments(self, optimizer: Any = None) -> list[list[torch.Tensor]]:
        """Return the moments of A and of B in float32, as torch or bitsandbytes stores them."""
        return [_moments((optimizer or self.optimizer).state[weight]) for weight in self.weights]


def _moments(state: dict[str, Any]) -> list[torch.Tensor]:
    if "exp_avg" in state:
        return [state["exp_avg"], state["exp_avg_sq"]]
    from bitsandbytes.functional import dequantize_blockwise

    return [
        dequantize_blockwise(state[f"state{n}"], absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=256)
        if state[f"state{n}"].dtype == torch.uint8
        else state[f"state{n}"]
        for n in "12"
    ]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "name", ["fused", "foreach", "amsgrad", "Adam", "bnb.AdamW", "bnb.Adam8bit", "bnb.AdamW8bit", "bnb.PagedAdamW8bit"]
)
def test_remaining_components_keep_their_moments(name: str) -> None:
    """A has 8 bits before and after; B, of 1,040 values before and 910 after, changes to 32."""
    trained = Trained(name)
    before = trained.moments()
    resize(trained.layer, CHANGE, adam_of(trained.optimizer))
    for side, (old, new) in enumerate(zip(before, trained.moments(), strict=True)):
        for power, (was, now) in enumerate(zip(old, new, strict=True), start=1):
            expected = was.index_select(side, torch.tensor(KEPT)) * (1, 2)[side] ** power
            added = expected.mean(dim=side, keepdim=True) if power == 2 else torch.zeros(1, 1)
            # Codes are of blocks of 256 values, which hold others now.
            near = 0.02 * float(expected.max()) if "8bit" in name and side == 0 else 1e-9
            torch.testing.assert_close(now.narrow(side, 0, 4), expected, rtol=1e-6, atol=near)
            new_ones = now.narrow(side, 4, 3)
            torch.testing.assert_close(new_ones, added.expand_as(new_ones), rtol=1e-6, atol=near)
    assert [int(trained.optimizer.state[weight]["step"]) for weight in trained.weights] == [3, 3]
    assert [group["params"] for group in trained.optimizer.param_groups] == [[w] for w in trained.weights]
    assert len(trained.optimizer.state) == 2
    start = [weight.detach().clone() for weight in trained.weights]
    trained.step()
    assert all(
        bool((w != was).any(dim=side).all()) for side, (w, was) in enumerate(zip(trained.weights, start, strict=True))
    )
    again = optimizer_of(name, trained.groups)
    again.load_state_dict(trained.optimizer.state_dict())
    for old, new in zip(trained.moments(), trained.moments(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_codes_of_eight_bits_are_those_of_the_whole_weight() -> None:
    trained = Trained("bnb.AdamW8bit")
    resize(trained.layer, CHANGE, adam_of(trained.optimizer))
    a, b = (trained.optimizer.state[weight] for weight in trained.weights)
    assert (a["state1"].dtype, b["state1"].dtype) == (torch.uint8, torch.float32)
    assert a["absmax1"].shape == (-(-7 * 300 // 256),)
    assert "absmax1" not in b


def test_paged_buffers_are_written_and_the_old_ones_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU pages nothing, so that buffers are made here as for a GPU: listed, and filled before they are written."""
    bnb = pytest.importorskip("bitsandbytes")
    pages = bnb.functional.GlobalPageManager.get_instance()
    monkeypatch.setattr(pages, "paged_tensors", [])

    def paged(self: Any, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer: Any = torch.zeros_like(weight, dtype=dtype)
        buffer.is_paged = True
        pages.paged_tensors.append(buffer)
        return buffer

    monkeypatch.setattr(bnb.optim.PagedAdamW8bit, "get_state_buffer", paged)
    monkeypatch.setattr(bnb.optim.PagedAdamW8bit, "prefetch_state", lambda self, weight: None)
    trained = Trained("bnb.PagedAdamW8bit")
    old = list(pages.paged_tensors)  # kept, so that no new one gets its id
    before = trained.moments()
    resize(trained.layer, CHANGE, adam_of(trained.optimizer))
    now = [trained.optimizer.state[w][name] for w in trained.weights for name in ("state1", "state2")]
    assert [id(buffer) for buffer in pages.paged_tensors] == [id(buffer) for buffer in now]
    assert not {id(buffer) for buffer in now} & {id(buffer) for buffer in old}
    assert all(buffer.is_paged for buffer in now)
    torch.testing.assert_close(trained.moments()[1][0][:, :4], before[1][0][:, KEPT] * 2)


def test_a_change_without_an_optimiser_changes_the_layer() -> None:
    trained = Trained("fused")
    resize(trained.layer, CHANGE, None)
    assert [tuple(weight.shape) for weight in trained.weights] == [(7, 300), (130, 7)]


def test_others_are_refused_by_name() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    bnb = pytest.importorskip("bitsandbytes")
    from transformers.optimization import Adafactor

    class Own(torch.optim.AdamW):
        """A subclass, which may keep what is not known here."""

    class Wrapper:
        """An optimiser around another, as sharding libraries have."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    adam = torch.optim.AdamW([weight])
    refused = {
        "torch.optim.sgd.SGD": torch.optim.SGD([weight]),
        "torch.optim.nadam.NAdam": torch.optim.NAdam([weight]),
        "Adafactor": Adafactor([weight]),
        "bitsandbytes.optim.lion.Lion8bit": bnb.optim.Lion8bit([weight]),
        "bitsandbytes.optim.ademamix.AdEMAMix": bnb.optim.AdEMAMix([weight]),
        "bitsandbytes.optim.lamb.LAMB": bnb.optim.LAMB([weight]),
        "Own": Own([weight]),
        "Wrapper": Wrapper(adam),
    }
    for name, optimizer in refused.items():
        with pytest.raises(ConfigError, match=rf"required AdamW or Adam of torch.*got .*{name}\."):
            adam_of(optimizer)
    assert adam_of(Accelerator(cpu=True).prepare(adam)) is adam
