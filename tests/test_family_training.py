"""Families in training and serving: low precision, checkpointing, early stopping, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaptive_lora.errors import AdapterError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, run_trial
from adaptive_lora.serving import generate, load_adapter

BaseContext = Callable[..., StudyContext]
METHODS = (
    "prompt_tuning:tokens=3", "prefix_tuning:tokens=3", "p_tuning:tokens=3,encoder_width=5",
    "ia3", "houlsby:width=3", "pfeiffer:width=3", "full", "ln_tuning", "head_only", "bitfit",
)  # fmt: skip
every_method = pytest.mark.parametrize(
    ("method", "base"),
    [
        *((method, "base_folder") for method in METHODS),
        *(pytest.param(m, "llama_folder", marks=pytest.mark.long) for m in METHODS[:-1]),
    ],
)


@every_method
def test_bf16_with_checkpointing_and_early_stopping(
    method: str, base: str, make_bench: BaseContext, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The trained weights stay float32; the saved adapter gives the tested scores again."""
    context = make_bench(
        methods=method, seeds="0", model=str(request.getfixturevalue(base)), precision="bf16",
        gradient_checkpointing="false" if method.startswith("prefix") else "true",
        max_steps=6, epochs=9, validations=6, patience=1, lr="3e-2",
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in context.base.model.state_dict().items()}
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    for name, tensor in context.base.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    curve = [loss for step, loss in outcome.train.validation_curve if step > 0]
    assert outcome.train.validation_loss == min(curve)
    for path in (tmp_path / "adapter").glob("*.safetensors"):
        if path.name != PROBE:
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    model, tokenizer, _ = load_adapter(tmp_path / "adapter")
    again = context.losses(model, context.splits(0).test)
    assert again.nll_E.tolist() == outcome.test.nll_E.tolist()
    assert len(generate(model, tokenizer, [[1, 2], [4, 5, 6]], max_new_tokens=3)) == 2


PROMPTS = [[72, 101, 108], [72, 101, 108, 65, 66, 67, 68], [90, 91], [72, 101, 109]]


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
@pytest.mark.parametrize("method", [*METHODS[:3], "houlsby:width=3"])
def test_generation_in_batches_with_a_cache_is_that_of_one_token_at_a_time(
    method: str, base: str, make_bench: BaseContext, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Padding must not move virtual tokens, nor the cache lose them."""
    folder = str(request.getfixturevalue(base))
    lr = "1e-3" if method.startswith("houlsby") else "1e-1"  # above it every answer is the same
    context = make_bench(methods=method, seeds="0", model=folder, max_steps=8, epochs=9, lr=lr)
    run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    model, tokenizer, _ = load_adapter(tmp_path / "adapter")
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert any(texts)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = list(prompt)
        for _ in range(5):
            row = torch.tensor([ids])
            with torch.no_grad():
                logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
            if int(logits[0, -1].argmax()) == tokenizer.eos_token_id:
                break
            ids.append(int(logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("method", ["prompt_tuning:tokens=3", "p_tuning:tokens=2", "houlsby"])
def test_seeds_decide_the_start(method: str, make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods=method, seeds="0 1", max_steps=2)
    first, other = (run_trial(context, t, tmp_path / t.label) for t in context.config.trials())
    again = run_trial(context, next(context.config.trials()), tmp_path / "again")
    assert again.test.nll_E.tolist() == first.test.nll_E.tolist()
    assert other.test.nll_E.tolist() != first.test.nll_E.tolist()


@pytest.mark.parametrize("method", ["ia3", "houlsby:width=2", "bitfit"])
def test_a_rate_that_moves_nothing_is_an_error(method: str, make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods=method, seeds="0", lr="1e-60")
    with pytest.raises(AdapterError, match="training did not move"):
        run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert not any(p.requires_grad for p in context.base.model.parameters())
