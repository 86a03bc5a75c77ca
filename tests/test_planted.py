"""Planted teachers: what is planted is known, and an ordinary study says which method comes near it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from documents import require_schema
from task_bases import run_and_prove

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate, uniform_cost
from adaptive_lora.allocation.site import ATTENTION_ROLES
from adaptive_lora.cli import main
from adaptive_lora.cli.planted import PlantedStudies
from adaptive_lora.config import study_from
from adaptive_lora.config.planted import SPECTRA, PlantedTeacher
from adaptive_lora.data import collate
from adaptive_lora.errors import AllocationError, ConfigError, DataError, ModelError
from adaptive_lora.methods.planted import PATTERNS
from adaptive_lora.models.losses import predict
from adaptive_lora.models.tasks.planted import (
    PlantedTask,
    make_teacher,
    planted_changes,
    planted_energy,
    token_kl,
    written_by,
)
from adaptive_lora.options import read_options
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.continued import _why_other_teacher
from adaptive_lora.runner.recorded import CONFIG, settings_to_record, study_settings
from adaptive_lora.tracking import StudyRun, connect

TEACHER = "planted:pattern=sparse,budget=uniform-3,distance=0.005,length=8,texts=40"
ORACLE = "planted:pattern=sparse,budget=uniform-3"


@pytest.fixture
def context(make_bench: Callable[..., StudyContext]) -> StudyContext:
    return make_bench(data=TEACHER, methods=f"uniform:budget=uniform-3 {ORACLE}")


@pytest.fixture
def task(context: StudyContext) -> PlantedTask:
    assert isinstance(context.task, PlantedTask)
    return context.task


def ranks_of(context: StudyContext, pattern: str, draw: int = 0) -> dict[str, int]:
    spec = MethodSpec.parse(f"planted:pattern={pattern},draw={draw},rank=3")
    plan = context.plan(spec, seed=0, fold=0)
    assert isinstance(plan, RankPlan)
    return dict.fromkeys((site.name for site in context.sites), 0) | dict(plan.rank_pattern())


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_planted_ranks_are_an_allocation_of_the_budget(context: StudyContext, pattern: str) -> None:
    ranks = ranks_of(context, pattern)
    cost = sum(ranks[site.name] * site.parameters_per_rank for site in context.sites)
    assert 0 <= uniform_cost(context.sites, 3) - cost < max(site.parameters_per_rank for site in context.sites)
    assert (ranks != ranks_of(context, pattern, draw=1)) is (pattern in ("sparse", "random"))


def test_patterns_put_rank_where_they_say_and_nowhere_else(context: StudyContext) -> None:
    last = max(site.layer for site in context.sites)
    for pattern, inside in (
        ("early", lambda site: site.layer == 0),
        ("late", lambda site: site.layer == last),
        ("one_family", lambda site: site.role in ATTENTION_ROLES),
        ("two_families", lambda site: site.role in ("output", "down")),
    ):
        ranks = ranks_of(context, pattern)
        assert {site.name for site in context.sites if inside(site)} == {name for name, rank in ranks.items() if rank}
        floor = ranks_of(context, f"{pattern},min_rank=1")
        assert min(floor.values()) == 1
        assert ranks_of(context, f"{pattern},min_rank=none") == floor
    chosen = [rank for rank in ranks_of(context, "sparse").values() if rank]
    assert len(chosen) == len(context.sites) // 4
    assert set(ranks_of(context, "flat").values()) == {3}


def test_graded_patterns_fall_with_depth_and_family(context: StudyContext) -> None:
    by_depth, by_family = ranks_of(context, "graded_depth"), ranks_of(context, "graded_families")
    for role in ("qkv", "output", "up", "down"):
        found = [by_depth[site.name] for site in context.sites if site.role == role]
        assert found[0] > found[-1] > 0
    for layer in (0, 1):
        role = {str(site.role): by_family[site.name] for site in context.sites if site.layer == layer}
        assert role["qkv"] > max(role["output"], role["down"])
        assert min(role["output"], role["down"]) > role["up"]


def test_a_pattern_that_a_base_lacks_is_said(context: StudyContext) -> None:
    feed_forward = [site for site in context.sites if site.role not in ATTENTION_ROLES]
    with pytest.raises(AllocationError, match="no site of the pattern one_family"):
        allocate(MethodSpec.parse("planted:pattern=one_family"), feed_forward)


def test_what_was_stored_with_rank_1_everywhere_keeps_its_meaning() -> None:
    before = "planted:pattern=sparse,draw=0,budget=uniform-2,spectrum=flat,distance=0.5,length=16,texts=640"
    teacher = PlantedTeacher(min_rank=1)
    assert teacher.known_as == before
    assert str(teacher) == before.replace("budget", "min_rank=1,budget")
    assert PlantedTeacher().known_as != before
    assert teacher.method().label == "planted-sparse-r2@uniform-2"
    assert PlantedTeacher().method().label == "planted-sparse-r2-min0@uniform-2"
    assert teacher.method().to_dict()["min_rank"] is None
    old = MethodSpec.build(
        "planted", {key: value for key, value in teacher.method().to_dict().items() if key != "name"}
    )
    assert old == teacher.method()


def test_a_recorded_method_without_a_floor_is_of_the_time_when_it_was_1(own_store: str) -> None:
    methods = ["uniform:rank=2", "planted:pattern=late", "planted:pattern=early,min_rank=2"]
    store = connect(study_from({"tracking_uri": own_store}).tracking)
    study = StudyRun.open(store, study_id="old", name="old", say=print)
    study.json(CONFIG, {"methods": methods, "lr": [1e-2], "seeds": [0]})
    store.settle()
    read = study_settings(StudyRun.find(store, "old"))["methods"]
    assert read == ["uniform:rank=2", "planted:pattern=late,min_rank=none", "planted:pattern=early,min_rank=2"]
    assert MethodSpec.parse(read[1]).label == "planted-late-r2"
    study.end("FINISHED")
    store.close()


def test_the_floor_is_recorded_where_its_method_has_a_default() -> None:
    texts = ["uniform", "planted:pattern=late", "random:of=planted", "planted", "planted:min_rank=1", "of=nowhere,"]
    recorded = settings_to_record({"methods": texts})["methods"]
    assert recorded == [
        "uniform", "planted:pattern=late,min_rank=0", "random:of=planted,min_rank=0", "planted:min_rank=0",
        "planted:min_rank=1", "of=nowhere,",
    ]  # fmt: skip


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_change_has_the_planted_rank_and_energy(context: StudyContext, spectrum: str) -> None:
    model = context.base.model
    ranks = {site.name: 1 + index % 4 for index, site in enumerate(context.sites)}
    changes = planted_changes(model, context.sites, ranks, spectrum, seed=0)
    modules = dict(model.named_modules())
    for site in context.sites:
        change, weight = changes[site.name].double(), modules[site.name].weight.double()
        assert change.shape == (site.out_features, site.in_features)
        values = torch.linalg.svdvals(change)
        planted = ranks[site.name]
        if spectrum == "noisy":
            top = float((values[:planted] ** 2).sum() / (values**2).sum())
            assert top == pytest.approx(1 / 1.1, rel=1e-3)
        else:
            assert int((values > 1e-5 * values[0]).sum()) == planted
        if spectrum == "power_law" and planted > 1:
            assert float(values[1] / values[0]) == pytest.approx(2**-0.5, rel=1e-4)
        unit = float((weight**2).sum()) / site.max_rank
        assert float((values**2).sum()) == pytest.approx(planted * unit, rel=1e-4)
        assert planted_energy(spectrum, planted, site.max_rank).sum() == pytest.approx(planted)


def test_teacher_is_at_the_distance_and_the_base_is_untouched(context: StudyContext) -> None:
    model, start = context.base.model, int(context.base.tokenizer.eos_token_id)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = written_by(model, count=8, length=12, start=start, seed=0, purpose="base")
    batch = collate(texts, start)
    ranks = dict.fromkeys((site.name for site in context.sites), 2)
    changes = planted_changes(model, context.sites, ranks, "flat", seed=0)
    teacher, scale = make_teacher(model, changes, batch, 0.005)
    with torch.no_grad():
        kl = token_kl(predict(teacher, batch), predict(model, batch))
    assert float(kl.sum()) / batch.supervised_tokens == pytest.approx(0.005, rel=0.011)
    name = context.sites[0].name
    added = teacher.get_submodule(name).weight - model.get_submodule(name).weight
    torch.testing.assert_close(added, scale * changes[name].T, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ModelError, match="smaller distance"):
        make_teacher(model, changes, batch, 1e6)


def test_kl_equals_its_definition(context: StudyContext) -> None:
    start = int(context.base.tokenizer.eos_token_id)
    batch = collate(written_by(context.base.model, count=3, length=6, start=start, seed=0, purpose="x"), start)
    with torch.no_grad():
        found = predict(context.base.model, batch)
        other = type(found)(logits=found.logits.flip(-1), targets=found.targets)
    p, q = (x.logits.double().softmax(-1) for x in (other, found))
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(token_kl(other, found).double(), expected, atol=1e-5, rtol=1e-5)
    assert float(token_kl(found, found).abs().max()) < 1e-6


def test_texts_start_and_end_as_asked_and_follow_the_seed(context: StudyContext) -> None:
    start = int(context.base.tokenizer.eos_token_id)

    def write(seed: int) -> list[tuple[int, ...]]:
        texts = written_by(context.base.model, count=70, length=9, start=start, seed=seed, purpose="x")
        return [text.input_ids for text in texts]

    first = write(0)
    assert len(first) == 70
    assert all(len(ids) == 10 and ids[0] == start for ids in first)
    assert first == write(0)
    assert first != write(1)


def test_a_model_equal_to_the_teacher_is_at_distance_zero(context: StudyContext, task: PlantedTask) -> None:
    test = context.splits(0).test
    assert abs(context.losses(task.teacher, test).loss) < 1e-6
    assert context.base_scores(0).loss > 1e-4
    batch = task.collate(test[:4])
    each = task.losses_by_example(context.base.model, batch)
    assert float(each.sum()) == pytest.approx(float(task.loss(context.base.model, batch)), rel=1e-6)


def test_the_teacher_decides_the_identity(context: StudyContext, make_bench: Callable[..., StudyContext]) -> None:
    same = make_bench(data="planted:texts=40,length=8,distance=0.005,budget=uniform-3")
    assert same.study_id == make_bench(data=TEACHER).study_id == context.study_id
    seen = {context.fingerprint["data"]}
    for change in ("draw=1", "spectrum=noisy", "distance=0.006"):
        known = TEACHER.replace("distance=0.005,", "") if "distance" in change else TEACHER
        seen.add(make_bench(data=f"{known},{change}").fingerprint["data"])
    assert len(seen) == 4


def test_plans_are_scored_by_the_planted_ranks(context: StudyContext, task: PlantedTask) -> None:
    oracle = task.plan_scores(context.plan(MethodSpec.parse(ORACLE), seed=0, fold=0))
    assert oracle["planted_rank_correlation"] == pytest.approx(1)
    assert oracle["planted_energy"] == pytest.approx(1)
    uniform = task.plan_scores(context.plan(MethodSpec.parse("uniform:budget=uniform-3"), seed=0, fold=0))
    assert set(uniform) == {"planted_energy"}  # equal ranks have no correlation
    assert uniform["planted_energy"] < 1
    assert task.plan_scores(context.plan(MethodSpec.parse("bitfit"), seed=0, fold=0)) == {}


def test_a_planted_study_is_an_ordinary_one(
    options: dict[str, object], own_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = f"uniform:budget=uniform-3 {ORACLE} empirical:budget=uniform-3 bitfit"
    changes = {"data": TEACHER, "methods": methods, "seeds": "0", "max_steps": 2, "tracking_uri": own_store}
    proven = run_and_prove(study_from({**options, **changes}))
    by_method = {record.method: record for record in proven.records}
    oracle = by_method[MethodSpec.parse(ORACLE).label]
    assert oracle.metrics["test/planted_rank_correlation"] == pytest.approx(1)
    assert oracle.test is not None
    assert oracle.test.unit == "nats of KL to the teacher per token"
    assert "planted_energy" not in by_method["bitfit"].test.others  # type: ignore[union-attr]
    assert "perplexity" not in " ".join(oracle.metrics)
    report = (proven.report.parent / "report.md").read_text(encoding="utf-8")
    assert "planted rank correlation" in report


def small(folder: Path, base: Path) -> list[str]:
    words = {
        "model": base, "distance": 0.005, "examples": 16, "test-examples": 8, "length": 8, "steps": 3, "lr": "1e-2",
        "validation-examples": 8,
        "patterns": "sparse", "methods": "random:of=planted", "seeds": "0 1", "batch-size": 4,
        "output": folder / "out", "tracking-uri": f"sqlite:///{folder}/m.db",
    }  # fmt: skip
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def test_command_runs_a_study_a_teacher_and_continues(base_folder: Path, tmp_path: Path) -> None:
    words = ["planted", "--json", *small(tmp_path, base_folder)]
    first = CliRunner().invoke(main, [*words, "--draws", "0 1"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    require_schema("planted", json.loads(first.stdout))
    found, table = (json.loads(first.stdout)[key] for key in ("studies", "table"))
    assert [entry["study_id"].rpartition("-")[0] for entry in found] == [
        "planted-sparse-flat-0", "planted-sparse-flat-1", "compare",
    ]  # fmt: skip
    methods = {method["label"]: method for method in found[-1]["comparison"]["methods"]}
    assert methods["planted-sparse-r2-min0@uniform-2"]["seeds"] == [0, 1, 10_000, 10_001]
    assert [(row["pattern"], row["trials"]) for row in table] == [("sparse", 4)] * 2
    assert {row["method"] for row in table} == set(methods) - {"uniform-r16@uniform-2"}
    assert found[-1]["comparison"]["headroom"]["share"] == table[0]["headroom"]
    again = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "6 trials are finished already; 0 to run" in again.stderr
    assert json.loads(again.stdout)["studies"][0]["comparison"]["methods"] == found[0]["comparison"]["methods"]


def test_rates_are_chosen_on_other_teachers_and_kept(base_folder: Path, tmp_path: Path) -> None:
    options = {"--draws": "5 6", "--tune-draws": "0 1", "--lr": "1e-3 1e-2", "--race": "false", "--seeds": "0"}
    words = ["planted", "--json", *small(tmp_path, base_folder), *(word for pair in options.items() for word in pair)]
    ran = CliRunner().invoke(main, words, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    found, table = (json.loads(ran.stdout)[key] for key in ("studies", "table"))
    *tuned, first, second, together = (entry["comparison"] for entry in found)
    assert len(tuned) == 2
    means: dict[str, dict[float, float]] = {}
    for method in (method for comparison in tuned for method in comparison["methods"]):
        for rate in method["rates"]:
            losses = means.setdefault(method["label"], {})
            losses[rate["lr"]] = losses.get(rate["lr"], 0.0) + rate["validation"]["mean"] / 2
    wanted = {label: min(losses, key=losses.__getitem__) for label, losses in means.items()}
    assert len(together["methods"]) == 3
    for comparison in (first, second):
        assert {method["label"]: method["lr"] for method in comparison["methods"]} == wanted
        assert all(len(method["rates"]) == 1 for method in comparison["methods"])
    assert [entry["data"].count("draw=") for entry in found] == [1, 1, 1, 1, 2]
    assert all(row["trials"] == 2 for row in table)
    words = "learning rates, chosen on draw 0 and 1 and kept: uniform-r16@uniform-2 0.0"
    assert words in ran.stderr.replace("\n", " ")
    assert words in " ".join(together["notes"])


def test_another_base_takes_planted_ranks_by_role(make_bench: Callable[..., StudyContext], llama_folder: Path) -> None:
    data = TEACHER.replace("sparse", "two_families").replace("0.005", "0.0001")
    oracle = "planted:pattern=two_families,budget=uniform-3"
    bench = make_bench(model=str(llama_folder), data=data, methods=f"uniform:budget=uniform-3 {oracle}")
    task = bench.task
    assert isinstance(task, PlantedTask)
    assert {name.rpartition(".")[2] for name, rank in task.ranks.items() if rank} == {"o_proj", "down_proj"}
    assert abs(bench.losses(task.teacher, bench.splits(0).test).loss) < 1e-6
    assert task.plan_scores(bench.plan(MethodSpec.parse(oracle), seed=0, fold=0))["planted_energy"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": "spares"}, "must be one of"),
        ({"methods": "empirical empirical"}, "given more than once"),
        ({"seeds": ""}, "at least one"),
        ({"draws": "1 1"}, "each once"),
        ({"draws": "1 2", "tune-draws": "2"}, "2 is in both"),
        ({"tune-draws": "2", "lr": "1e-2"}, "two learning rates"),
        ({"budget": "12"}, "no site a rank"),
        ({"budget": "much"}, "whole number of parameters"),
        ({"distance": "0"}, "distance must be above 0"),
        ({"model": "./nowhere"}, "does not exist"),
        ({"steps": "0", "lr": "-1"}, "steps must be at least 1"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(
    changes: dict[str, str], message: str, tmp_path: Path, base_folder: Path
) -> None:
    options = {"model": str(base_folder), **changes}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    result = CliRunner().invoke(main, ["planted", *words])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "planted:patern=late"}, "did you mean 'pattern'"),
        ({"data": "planted:pattern=nowhere"}, "pattern must be one of"),
        ({"task": "classification"}, "required --task causal"),
        ({"batching": "packed"}, "not packed"),
        ({"methods": "uniform:rank=2 uniform:rank=2,base=nf4"}, "required base=full"),
        ({"test_data": "rows.json"}, "leave test_data"),
        ({"methods": "empirical:rank=2,profiled_on=embedded"}, "required a planted teacher"),
        ({"methods": "empirical:rank=2,profiled_on=planted"}, "has one teacher"),
    ],
)
def test_a_study_refuses_what_a_teacher_cannot_do(
    changes: dict[str, str], message: str, make_bench: Callable[..., StudyContext]
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        make_bench(**{"data": TEACHER, "methods": "uniform:rank=2", **changes})


def test_a_teacher_is_read_back_from_its_text() -> None:
    teacher = PlantedTeacher(pattern="late", draw=3, spectrum="noisy", distance=0.25, min_rank=1)
    assert PlantedTeacher.parse(str(teacher)) == teacher
    assert PlantedTeacher.parse("planted") == PlantedTeacher()
    assert PlantedTeacher.parse("planted.json") is None


def test_all_problems_of_the_settings_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        read_options(PlantedStudies, {"stepz": 3, "lr": "fast", "batch_size": 0})
    text = str(raised.value)
    assert "did you mean 'steps'" in text
    assert "expected a number" in text
    assert "batch_size must be at least 1" in text


def test_a_study_of_another_floor_is_told_why_it_is_refused() -> None:
    assert "min_rank" in _why_other_teacher("planted:pattern=late")
    assert _why_other_teacher("planted:pattern=late,min_rank=0") == _why_other_teacher("rows.jsonl") == ""


def test_defaults_are_one_alpha_a_whole_grid_of_rates_and_128_texts_to_choose_on() -> None:
    ((teacher, study),) = next(PlantedStudies(patterns=("late",)).studies({}, (0,)))
    assert (study.train.scaling, study.race, study.train.max_steps, len(study.lr)) == ("standard", False, 800, 3)
    assert round(study.data.validation_share * teacher.texts) == 128
    assert study.specs[1].label == teacher.method().label == teacher.oracles()[0]
    ((_, raced), *_) = next(PlantedStudies(race=True).studies({}, (0,)))
    ((_, alone), *_) = next(PlantedStudies(race=True, lr=(4e-3,)).studies({}, (0,)))
    assert (raced.race, alone.race) == (True, False)
    ((floor, study),) = next(PlantedStudies(patterns=("late",), min_rank=1).studies({}, (0,)))
    assert study.specs[1].label == floor.method().label == "planted-late-r2@uniform-2"
