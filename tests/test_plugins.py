"""Methods and profilers of other packages: installed, named, run, and refused where broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from allocation_cases import DIALOGPT_MEDIUM
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from task_bases import prove
from tracked import quiet, trials_in, words_of

from adaptive_lora import plugins
from adaptive_lora.allocation import METHODS, METRICS, MethodSpec, allocate, method_options, uniform_cost
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError
from adaptive_lora.methods.adapters.export import export_uniform
from adaptive_lora.methods.importance import PROFILERS
from adaptive_lora.methods.peft_types.table import TYPES
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving.other_types import register
from adaptive_lora.serving.safety import UnsafeFiles
from adaptive_lora.tracking import StudyRun, read_trials
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder, requirements_of

EXAMPLE = Path(__file__).parent / "plugin_example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, installed by pip into a folder of its own, without a network."""
    folder = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "lora_edges.py", "lora_shift.py"):  # a build leaves files beside the source
        (copy / name).write_text((EXAMPLE / name).read_text(encoding="utf-8"), encoding="utf-8")
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", *words, "--target", str(folder), str(copy)], check=True)
    return folder


def forget() -> None:
    """Let the tables look at the installed packages anew."""
    plugins._offers.cache_clear()
    for table in (METHODS, METRICS, PROFILERS, TYPES):
        table._loaded.clear()
    for name in ("lora_edges", "lora_shift"):
        sys.modules.pop(name, None)
    for known in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        known.pop("SHIFT", None)


@pytest.fixture
def at_hand(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example on the import path of this process."""
    monkeypatch.syspath_prepend(str(installed))
    forget()
    yield installed
    monkeypatch.undo()
    forget()


def offer(folder: Path, package: str, group: str, name: str, value: str) -> None:
    """Put a package's metadata with one entry point into a folder."""
    info = folder / f"{package.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[adaptive_lora.{group}]\n{name} = {value}\n")


def command(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with a folder on its import path."""
    before = os.environ.get("PYTHONPATH")
    places = [str(path), *([before] if before else [])]
    return subprocess.run(
        [sys.executable, "-m", "adaptive_lora.cli", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_example_is_short_and_its_names_are_known(at_hand: Path) -> None:
    assert len((EXAMPLE / "lora_edges.py").read_text().splitlines()) <= 32
    assert "edges" in METHODS
    assert "frobenius" in METRICS
    assert METRICS["frobenius"] == "from lora-edges==1.2"
    assert "lora_edges" not in sys.modules  # named, not imported
    assert MethodSpec.parse("edges").label == "edges-r8-edge3"
    assert "lora_edges" in sys.modules


EARLIER = """
from dataclasses import dataclass
from typing import ClassVar
from adaptive_lora.allocation import Evidence, RankDemand
from adaptive_lora.allocation.demand import METRICS
from adaptive_lora.importance.weights import WeightProfiler
from adaptive_lora.sites import AdapterSite


@dataclass(frozen=True, kw_only=True)
class Old:
    metric: ClassVar[str | None] = None
    recipe: ClassVar[str] = "truncate"
    start_rank: int | None = None
    rank: int = 4
    rank_label: ClassVar[str] = "r4"

    def demand(self, sites: list[AdapterSite], evidence: Evidence | None) -> RankDemand:
        return RankDemand(ranks=(4.0,) * len(sites))
"""


def test_a_plugin_for_an_earlier_version_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_lora.py").write_text(EARLIER)
    offer(tmp_path, "old-lora", "methods", "old", "old_lora:Old")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    try:
        spec = MethodSpec.parse("old")
        plan = allocate(spec, DIALOGPT_MEDIUM)
        assert {entry.rank for entry in plan.entries} == {4}
        assert spec.options.ranks_in_training  # it shares the training of truncate
        assert not spec.options.is_plain_lora
    finally:
        monkeypatch.undo()
        forget()


def test_its_method_holds_budgets_and_limits_like_any_other(at_hand: Path) -> None:
    plan = allocate(MethodSpec.parse("edges:edge=4,budget=2000000,max_rank=16,dora=true"), DIALOGPT_MEDIUM)
    assert 0 <= 2_000_000 - plan.trainable_parameters < 5 * 1024
    ranks = plan.rank_pattern()
    assert max(ranks.values()) == 16
    assert ranks["transformer.h.0.mlp.c_fc"] > ranks["transformer.h.9.mlp.c_fc"]
    control = allocate(MethodSpec.parse("inverse:of=edges,rank=4"), DIALOGPT_MEDIUM)
    assert control.trainable_parameters <= uniform_cost(DIALOGPT_MEDIUM, 4)
    with pytest.raises(ConfigError, match="edges: edge must be above 0"):
        MethodSpec.parse("edges:edge=0")


def test_its_version_is_part_of_a_trials_identity(
    at_hand: Path, make_study: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"base": "b", "data": "d", "precision": "fp32"}
    trials = list(make_study(methods="edges empirical:metric=frobenius uniform").trials())[:3]
    assert [trial.method.packages for trial in trials] == [
        ("lora-edges==1.2",), ("lora-edges==1.2",), (),
    ]  # fmt: skip
    before = [trial.signature(own) for trial in trials]
    monkeypatch.setattr(plugins, "package_of", lambda entry: "lora-edges==1.3")
    after = [trial.signature(own) for trial in trials]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, True, False]


def test_a_study_with_them(at_hand: Path, in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    config = in_store(methods="uniform:rank=2 edges:rank=2 empirical:rank=2,metric=frobenius")
    outcome, _ = quiet(config)
    assert outcome.study_result.champion is not None
    tags = {run.data.tags["method"]: run.data.tags for run in trials_in(tmp_path)}
    assert tags["edges-r2-edge3"]["plugins"] == "lora-edges==1.2"
    assert tags["empirical-r2-frobenius"]["plugins"] == "lora-edges==1.2"
    assert "plugins" not in tags["uniform-r2"]


def test_a_study_with_a_type_of_adapter_that_peft_does_not_have(
    at_hand: Path, in_store: Callable[..., StudyConfig], llama_folder: Path
) -> None:
    """Counted, trained, registered with the package among its requirements, loaded back and equal."""
    config = in_store(methods="uniform:rank=1 peft:type=SHIFT,budget=2104", seeds="0", model=str(llama_folder))
    outcome, _ = quiet(config)
    assert outcome.study_result.champion is not None
    context = StudyContext(config)
    runs = StudyRun.find(outcome.store, outcome.study_result.study_id).children()
    (record,) = [one for one in read_trials(outcome.store, runs) if one.method == "peft-SHIFT@2104"]
    assert record.tags["plugins"] == "lora-edges==1.2"
    assert record.trainable_parameters == 2104
    prove(context, record, record.tags[MODEL_TAG])
    folder = adapter_folder(record.tags[MODEL_TAG])
    assert "lora-edges" in requirements_of(folder)
    with pytest.raises(AdapterError, match="PEFT has no conversion of SHIFT to LoRA"):
        export_uniform(folder, folder.parent / "uniform")


def test_an_adapter_of_a_type_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFiles, match=r"PEFT has no type of adapter SHIFT.* install the package that"):
        register("SHIFT")


def test_commands_know_them(installed: Path, options: dict[str, object]) -> None:
    shown = command(installed, "plan", "--help")
    assert "--edge FLOAT" in shown.stdout
    words = ["--model", str(options["model"]), "--method", "edges:rank=2", "--json"]
    plan = json.loads(command(installed, "plan", *words).stdout)
    assert plan["method"] == "edges-r2-edge3"
    names = ("model", "data", "template", "max_tokens", "precision")
    data = words_of({name: options[name] for name in names})
    profile = command(installed, "profile", "--metric", "frobenius", *data, "--json")
    assert profile.returncode == 0, profile.stderr
    assert json.loads(profile.stdout)["metric"] == "frobenius"


def test_a_package_that_does_not_load_is_named(tmp_path: Path, options: dict[str, object]) -> None:
    offer(tmp_path, "broken-lora", "methods", "gone", "no_such_module:Method")
    used = command(tmp_path, "plan", "--model", str(options["model"]), "--method", "gone")
    assert used.returncode == 2
    assert "of the package broken-lora==0.1 cannot be used" in used.stderr
    assert "ModuleNotFoundError: No module named 'no_such_module'" in used.stderr
    assert "Traceback" not in used.stderr


def test_what_is_no_method_is_refused_and_stands_in_nobodys_way(
    at_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offer(tmp_path, "number-lora", "methods", "number", "math:pi")
    offer(tmp_path, "class-lora", "profilers", "half", "fractions:Fraction")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    with pytest.raises(ConfigError, match="TypeError: required a frozen dataclass of options"):
        MethodSpec.parse("number")
    with pytest.raises(ConfigError, match="TypeError: required a function of a ProfileTask"):
        PROFILERS["half"]
    assert "edge" in method_options()  # what help is made of
    assert "number-lora==0.1 cannot be used" in caplog.text
    assert MethodSpec.parse("uniform").name == "uniform"


def test_a_name_that_two_have_is_refused(at_hand: Path, tmp_path: Path) -> None:
    offer(tmp_path, "more-edges", "methods", "edges", "lora_edges:Edges")
    offer(tmp_path, "my-uniform", "methods", "uniform", "lora_edges:Edges")
    offer(tmp_path, "my-profiler", "profilers", "heavy_tail", "lora_edges:frobenius")
    sys.path.insert(0, str(tmp_path))
    try:
        forget()
        with pytest.raises(ConfigError, match=r"(lora-edges==1\.2|more-edges==0\.1), (lora|more)-"):
            MethodSpec.parse("edges")
        with pytest.raises(ConfigError, match=r"adaptive-lora itself, my-uniform==0\.1"):
            MethodSpec.parse("uniform")
        with pytest.raises(ConfigError, match=r"adaptive-lora itself, my-profiler==0\.1"):
            PROFILERS["heavy_tail"]
    finally:
        sys.path.remove(str(tmp_path))


def test_a_profiler_of_other_sites_is_refused(
    at_hand: Path, make_bench: Callable[..., StudyContext], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import lora_edges

    def first_only(task: object) -> object:
        found = PROFILERS["heavy_tail"](task)
        name = next(iter(found.whole))
        return type(found)(whole={name: found.whole[name]})

    monkeypatch.setattr(lora_edges, "frobenius", first_only)
    context = make_bench(methods="empirical:rank=2,metric=frobenius")
    with pytest.raises(AllocationError, match="measured other sites than the 12"):
        run_trial(context, next(context.config.trials()), tmp_path / "adapter")
