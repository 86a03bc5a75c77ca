"""What works without the extra `study`, and how a missing one is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import adaptive_lora
from adaptive_lora.cli import main
from adaptive_lora.errors import EXTRAS, ConfigError, MissingExtra, installed, naming_extras, require_extra

CORE = f"""
import sys
from importlib.machinery import PathFinder

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {set().union(*EXTRAS.values()) | {"pandas"}} else super().find_spec(
            name, path, target)

sys.meta_path = [Core if finder is PathFinder else finder for finder in sys.meta_path]
import json
import logging
from click.testing import CliRunner
import adaptive_lora
from adaptive_lora.cli import main
from adaptive_lora.errors import ConfigError

answers = {{}}

def run(*words):
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    answers[" ".join(words)] = (result.exit_code, result.stdout, result.stderr)
"""
"""Beginning of a program in which the packages of all extras are not to be found."""


def without_extras(program: str) -> dict[str, Any]:
    """Return what a program printed, as the last line, where no extra is installed."""
    words = [sys.executable, "-c", f"{CORE}\n{program}\nprint(json.dumps(answers))"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


REFUSED = ("study", "train", "compare", "transfer", "evaluate", "export a b", "planted", "ui", "upgrade-store", "sync",
           "power --study-id x", "profile --tracking-uri sqlite:///x.db")  # fmt: skip


def test_commands_that_need_the_extra_are_refused_before_torch() -> None:
    found = without_extras(
        f"for words in {REFUSED!r}: run(*words.split())\nrun('study', '--json')\n"
        "run('power', '--difference', '0.1', '--spread', '0.1')\nrun('--help')\n"
        "assert 'torch' not in sys.modules"
    )
    for words in REFUSED:
        code, output, said = found[words]
        assert code == 2
        assert not output
        assert said.endswith('not installed: pip install "adaptive-lora[study]"\n'), said
    code, output, _ = found["study --json"]
    error = json.loads(output)["error"]
    assert (code, error["type"], error["exit_code"]) == (2, "MissingExtra", 2)
    assert found["power --difference 0.1 --spread 0.1"][0] == 0
    code, listed, _ = found["--help"]
    assert code == 0
    assert all(f"  {name} " in listed for name in main.commands)


OWN_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (2, 2, 6))]
config = adaptive_lora.lora_config(model, "waterfill", budget="uniform-2", dataloader=batches)
answers["lora_config"] = len(config.target_modules)
"""


def test_the_core_plans_profiles_and_emits(base_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    model = f"'--model', {str(base_folder)!r}"
    found = without_extras(
        "data = ('--data', 'rows.json', '--template', 'compact', '--profile-batches', '2',\n"
        f"        '--profile-batch-size', '2', {model})\n"
        f"run('plan', {model})\n"
        "assert not {'peft', 'bitsandbytes', 'scipy.stats'} & set(sys.modules)\n"
        "run('profile', '--json', *data)\n"
        "measured = 'adaptive-lora-out/profile_weight_gradient_seed0.json'\n"
        f"run('plan', {model}, '--method', 'empirical', '--profile', measured, '--json')\n"
        f"run('plan', {model}, '--emit', 'peft')\n"
        "run('doctor', '--json')\n"
        f"{OWN_MODEL}\n"
        "for name in adaptive_lora.__all__:\n"
        "    try: getattr(adaptive_lora, name)\n"
        "    except ConfigError as error: answers[name] = str(error)\n"
    )
    answers = iter(found.values())
    code, output, said = next(answers)
    assert code == 0, said
    assert "transformer.h.0.attn.c_attn" in output
    code, output, said = next(answers)
    assert (code, json.loads(output).get("metric")) == (0, "weight_gradient"), said
    assert 'not logged: that needs mlflow, which is not installed: pip install "adaptive-lora[study]"' in said
    code, output, said = next(answers)
    assert (code, len(json.loads(output)["sites"])) == (0, 12), said
    code, output, said = next(answers)
    assert (code, json.loads(output)["peft_type"]) == (0, "LORA"), said
    code, output, said = next(answers)
    checks = {one["check"]: one for one in json.loads(output)}
    assert code == 2
    assert checks["base model"]["status"] == "ok"
    assert checks["tracking"]["text"].endswith('pip install "adaptive-lora[study]"')
    assert found["lora_config"] == 14
    assert found["run_study"] == (
        'adaptive_lora.run_study needs mlflow, which is not installed: pip install "adaptive-lora[study]"'
    )


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "__init__.py").write_text("import gguf.lost", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    require_extra("gguf", "this")
    with pytest.raises(ModuleNotFoundError, match=r"gguf\.lost"), naming_extras("this"):
        __import__("gguf")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert not installed("gguf")
    says = 'this needs gguf, which is not installed: pip install "adaptive-lora\\[gguf\\]"'
    with pytest.raises(ConfigError, match=says):
        require_extra("gguf", "this")
    with pytest.raises(MissingExtra, match=says), naming_extras("this"):
        __import__("gguf")
    with pytest.raises(ModuleNotFoundError), naming_extras("this"):
        __import__("a_module_of_nobody")
    assert "__version__" in adaptive_lora.__all__


def test_ray_that_is_missing_is_named_before_the_base_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["study", "--engine", "ray", "--model", "nowhere"], catch_exceptions=False)
    assert result.exit_code == 2
    assert '--engine ray needs ray, which is not installed: pip install "adaptive-lora[ray]"' in result.stderr
