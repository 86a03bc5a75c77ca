"""What libraries raise over a model: one line that names the place; our own mistakes stay bare."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from peft.tuners.lora import LoraModel
from tracked import words_of
from transformers.models.gpt2 import modeling_gpt2

from adaptive_lora.cli import main
from adaptive_lora.errors import ModelError
from adaptive_lora.models.errors import is_bug, model_errors, of_a_library
from adaptive_lora.training.trainer import Trainer

Train = Callable[..., Result]


@pytest.fixture
def train(options: dict[str, object], own_store: str, tmp_path: Path) -> Train:
    """Return a function that runs the command, with all that it writes in the test's folder."""
    kept = {key: value for key, value in options.items() if key not in ("methods", "seeds")}
    output = tmp_path / "out"

    def run(command: str = "train", **changes: object) -> Result:
        given = {**kept, "tracking_uri": own_store, "output": output, **changes}
        if command == "profile":
            del given["lr"]
        words = words_of(given)
        return CliRunner().invoke(main, [command, *words])

    return run


def logged(result: Result) -> str:
    (place,) = re.findall(r"The library's traceback is in (.*)", result.stderr)
    return Path(place).read_text(encoding="utf-8")


def one_line(result: Result) -> str:
    assert result.exit_code == 2, "".join(traceback.format_exception(result.exception))
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert "The library's traceback is in" in result.stderr
    return lines[0]


def test_a_refusal_of_peft_names_the_site(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = LoraModel._create_and_replace

    def refuses(self: Any, config: Any, name: str, target: Any, *rest: Any, **named: Any) -> None:
        if named["current_key"].endswith("h.1.mlp.c_fc"):
            raise ValueError("Target module Conv1D() is not supported.")
        create(self, config, name, target, *rest, **named)

    monkeypatch.setattr(LoraModel, "_create_and_replace", refuses)
    result = train(method="uniform:rank=2")
    line = one_line(result)
    assert "uniform-r2 cannot be attached to GPT2LMHeadModel" in line
    assert "ValueError at transformer.h.1.mlp.c_fc: Target module Conv1D() is not" in line
    assert "peft/tuners" in logged(result)


@pytest.mark.parametrize("command", ["train", "study", "profile"])
def test_a_model_that_fails_in_its_forward_pass(
    command: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", fails)
    result = train(command)
    line = one_line(result)
    assert "RuntimeError at transformer.h.0.mlp: mat1 and mat2" in line
    assert "modeling_gpt2.py" in logged(result)


def test_a_backward_pass_that_fails(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no backward kernel")

    forward = modeling_gpt2.GPT2MLP.forward
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", lambda self, hidden: Broken.apply(forward(self, hidden)))
    result = train(method="uniform:rank=2")
    line = one_line(result)
    assert "uniform-r2" in line
    assert "NotImplementedError: no backward kernel" in line
    assert "autograd" in logged(result)


def test_a_damaged_base_keeps_the_librarys_traceback(train: Train, tmp_path: Path, base_folder: Path) -> None:
    import shutil

    folder = shutil.copytree(base_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    result = train(model=folder)
    assert result.exit_code == 2
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, AttributeError])
def test_a_mistake_of_our_own_is_no_status(
    error: type[Exception], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: Trainer, window: Any) -> float:
        raise error("ours")

    monkeypatch.setattr(Trainer, "learn", mistaken)
    result = train()
    assert isinstance(result.exception, error)
    assert "Error: " not in result.output


def test_a_mistake_of_our_own_in_loading_is_no_status(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptive_lora.serving import task_models

    def mistaken(model: Any) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(task_models, "settle", mistaken)
    assert isinstance(train().exception, AttributeError)


def test_whose_an_error_is() -> None:
    def raised(work: Callable[[], object]) -> Exception:
        try:
            work()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    theirs = raised(lambda: torch.nn.Embedding(2, 2)(torch.tensor([5])))
    assert of_a_library(theirs)
    assert not is_bug(theirs)
    ours = raised(lambda: {}["missing"])
    assert is_bug(ours)
    assert not is_bug(raised(lambda: int("x")))
    with pytest.raises(KeyError), model_errors("nothing works"):
        raise ours
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    matched = pytest.raises(ModelError, match="nothing works: RuntimeError at 0: ")
    with matched as caught, model_errors("nothing works", layer):
        layer(torch.ones(1, 3))
    assert "linear.py" in "".join(traceback.format_exception(caught.value))
    absent: Any = peft.LoraConfig(target_modules=["absent"])
    with pytest.raises(ModelError, match="not found"), model_errors("nothing works", layer):
        peft.get_peft_model(layer, absent)  # type: ignore[arg-type]
