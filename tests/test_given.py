"""Ranks by names and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from allocation_cases import DIALOGPT_MEDIUM, gpt2_sites
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.cli import main
from adaptive_lora.config import study_from
from adaptive_lora.errors import AllocationError, ConfigError
from adaptive_lora.models.sites import find_sites

SITES = gpt2_sites(2, 64)


def ranks(text: str) -> dict[str, int]:
    """Return site name -> rank."""
    return allocate(MethodSpec.parse(text), SITES).rank_pattern()


def test_names_end_those_of_modules_and_the_longest_counts() -> None:
    found = ranks("given:ranks=*=1+c_proj=2+h.1.*=3+h.1.mlp.c_proj=5+transformer.h.0.attn.c_attn=7")
    assert found == {
        "transformer.h.0.attn.c_attn": 7,
        "transformer.h.0.attn.c_proj": 2,
        "transformer.h.0.mlp.c_fc": 1,
        "transformer.h.0.mlp.c_proj": 2,
        "transformer.h.1.attn.c_attn": 3,
        "transformer.h.1.attn.c_proj": 2,
        "transformer.h.1.mlp.c_fc": 3,
        "transformer.h.1.mlp.c_proj": 5,
    }


def test_a_site_that_nothing_names_has_no_adapter() -> None:
    assert set(ranks("given:ranks=mlp.c_fc=3")) == {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"}


def test_with_a_budget_ranks_are_proportions() -> None:
    plan = allocate(MethodSpec.parse("given:ranks=c_attn=3+c_fc=1,budget=uniform-8"), SITES)
    by_end = {name.rpartition(".")[2]: rank for name, rank in plan.rank_pattern().items()}
    assert by_end["c_attn"] == pytest.approx(3 * by_end["c_fc"], abs=2)
    assert 0 <= (plan.budget or 0) - plan.trainable_parameters < 5 * 64


def test_a_control_permutes_them() -> None:
    given = ranks("given:ranks=h.0.*=8+h.1.*=2")
    permuted = ranks("random:of=given,ranks=h.0.*=8+h.1.*=2")
    assert given != permuted
    assert sorted(given.values()) == sorted(permuted.values())


def test_python_takes_a_text_a_list_or_a_mapping() -> None:
    wanted = MethodSpec.parse("given:ranks=c_attn=4+c_fc=2")
    for ranks in ("c_attn=4+c_fc=2", "c_attn=4 c_fc=2", ["c_attn=4", "c_fc=2"], {"c_attn": 4, "c_fc": 2}):
        assert MethodSpec.build("given", {"ranks": ranks}) == wanted


def test_a_study_holds_the_ranks_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"c_attn": 4, "c_fc": 2}')
    file = f"ranks={tmp_path / 'found.json'},budget=uniform-2"
    study = study_from({"methods": f"given:{file} random:of=given,{file} gora:ranks=uniform"})
    assert study.methods == (
        "given:ranks=c_attn=4+c_fc=2,budget=uniform-2",
        "random:of=given,ranks=c_attn=4+c_fc=2,budget=uniform-2",
        "gora:ranks=uniform",
    )


def test_a_plan_gives_its_ranks(tmp_path: Path) -> None:
    plan = allocate(MethodSpec.parse("linear_decay:rank=8,low_rank=2"), SITES)
    file = tmp_path / "rank_plan.json"
    file.write_text(json.dumps(plan.to_dict()))
    again = MethodSpec.parse(f"given:ranks={file}")
    assert allocate(again, SITES).rank_pattern() == plan.rank_pattern()
    file.unlink()
    assert MethodSpec.build("given", {"ranks": again.to_dict()["ranks"]}) == again  # the file is not needed any more
    assert str(tmp_path) not in json.dumps(again.to_dict())


@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        (["c_attn", "c_fc", "mlp.c_proj"], {"h.0.mlp.c_fc": 5, "attn.c_attn": 2}),
        (["h.0.mlp.c_fc"], {"c_fc": 4}),
        (["c_fc", "h.1.attn.c_attn"], {"h.0.mlp.c_fc": 1, "1.mlp.c_fc": 4}),
    ],
)
def test_an_adapter_of_peft_gives_its_ranks(
    targets: list[str], pattern: dict[str, int], tmp_path: Path, base_folder: Path
) -> None:
    config = LoraConfig(r=3, target_modules=targets, rank_pattern=pattern, fan_in_fan_out=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    model.save_pretrained(str(tmp_path))
    made = {name.removeprefix("base_model.model."): module.r["default"] for name, module in model.named_modules()
            if hasattr(module, "lora_A")}  # fmt: skip
    found = allocate(MethodSpec.parse(f"given:ranks={tmp_path}"), find_sites(model.unload())).rank_pattern()
    assert found == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[1, 2]", "no object with names"),
        ("{}", "no object with names"),
        ('{"c_fc": 2.5}', "c_fc has 2.5"),
        ('{"c_fc": true}', "c_fc has True"),
        ('{"c_fc": -1}', "c_fc has -1"),
        ('{"sites": [{"name": "c_fc"}]}', "KeyError: 'rank'"),
        ('{"r": 2, "rank_pattern": {}, "target_modules": "all-linear"}', "all-linear"),
        ('{"r": 2, "rank_pattern": {}, "target_modules": ["c_fc"], "layers_to_transform": [0]}', "layers_to_transform"),
        ('{"r": 2, "rank_pattern": {"c_attn": 4}, "target_modules": ["c_fc"]}', "c_attn of rank_pattern is no target"),
        (
            '{"r": 2, "rank_pattern": {"c_fc": 4, "h.0.mlp.c_fc": 1}, "target_modules": ["c_fc"]}',
            "h.0.mlp.c_fc of rank_pattern never counts",
        ),
        ('{"r": 2, "rank_pattern": {}, "target_modules": ["c_fc"], "peft_type": "LOHA"}', "LOHA"),
        ('{"r": 2, "rank_pattern": {"h\\\\.[01].c_fc": 3}, "target_modules": ["c_fc"]}', "regular expression"),
    ],
)
def test_files_without_ranks_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        MethodSpec.parse(f"given:ranks={file}")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("given", ConfigError, "required ranks"),
        ("given:ranks=c_attn=x", ConfigError, "got 'c_attn=x'"),
        ("given:ranks=c_attn=1+nowhere.json", ConfigError, "or one file; got 'nowhere.json'"),
        ("given:ranks=c_attn=1+c_attn=2", ConfigError, "twice"),
        ("given:ranks=nowhere.json", ConfigError, "FileNotFoundError"),
        ("given:ranks=c_attn=0", AllocationError, "every rank is 0"),
        ("given:ranks=attn=3+c_fc=1", AllocationError, "1 of 2 names end the name of no adapter site: attn;"),
        ("given:ranks=c_attn=2000", AllocationError, "rank 2000; required 0 to 1024"),
        ("given:ranks=c_attn=3,multiple=2", AllocationError, "in steps of 2"),
        ("given:ranks=c_attn=3,min_rank=1", AllocationError, "required 1 to"),
    ],
)
def test_what_cannot_be_given(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        allocate(MethodSpec.parse(text), DIALOGPT_MEDIUM)


def test_a_trial_trains_them(tmp_path: Path) -> None:
    """The ranks that one study found are compared in another."""
    options: dict[str, Any] = {"max_examples": 40, "max_steps": 2, "seeds": 0, "lr": 1e-2, "precision": "fp32"}
    plan = CliRunner().invoke(main, ["plan", "--method", "linear_decay:rank=3,low_rank=1", "--json"])
    (tmp_path / "found.json").write_text(plan.stdout)
    methods = f"uniform:rank=2 given:ranks={tmp_path / 'found.json'}"
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    store = f"--tracking-uri=sqlite:///{tmp_path / 'mlflow.db'}"
    ran = CliRunner().invoke(
        main, ["study", f"--methods={methods}", *arguments, store, f"--output={tmp_path}", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    (trained,) = (m for m in json.loads(ran.stdout)["methods"] if m["label"].startswith("given-"))
    assert trained["parameters"]["mean"] == RankPlan.from_dict(json.loads(plan.stdout)).trainable_parameters
