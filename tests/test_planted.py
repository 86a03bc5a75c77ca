"""The planted benchmark: what is planted is known, and what is said about it follows from cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from adaptive_lora.allocation import uniform_cost
from adaptive_lora.allocation.site import ATTENTION_ROLES
from adaptive_lora.cli import main
from adaptive_lora.data import collate
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.models.losses import predict
from adaptive_lora.options import read_options
from adaptive_lora.seeding import rng_for
from adaptive_lora.study.planted.cell import ORACLE, UNIFORM, CellResult, Planter
from adaptive_lora.study.planted.config import PlantedConfig
from adaptive_lora.study.planted.context import PlantedContext
from adaptive_lora.study.planted.findings import Outcome, conclude
from adaptive_lora.study.planted.patterns import PATTERNS, SPECTRA, planted_energy, planted_ranks
from adaptive_lora.study.planted.teacher import make_teacher, planted_changes, token_kl, written_by


@pytest.fixture
def config(base_folder: Path, tmp_path: Path) -> PlantedConfig:
    return PlantedConfig(
        model=str(base_folder),
        patterns=("sparse", "flat"),
        methods=("empirical", "random:of=empirical"),
        seeds=(0, 1),
        distance=0.005,
        examples=16,
        test_examples=8,
        length=8,
        steps=2,
        batch_size=4,
        output=str(tmp_path / "out"),
    )


@pytest.fixture
def planter(config: PlantedConfig) -> Planter:
    return Planter(config)


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_planted_ranks_are_an_allocation_of_the_budget(planter: Planter, pattern: str) -> None:
    budget = uniform_cost(planter.sites, 3)
    ranks = planted_ranks(pattern, planter.sites, budget, rng_for(0, pattern))
    cost = sum(ranks[site.name] * site.parameters_per_rank for site in planter.sites)
    assert 0 <= budget - cost < max(site.parameters_per_rank for site in planter.sites)
    assert min(ranks.values()) >= 1
    assert ranks == planted_ranks(pattern, planter.sites, budget, rng_for(0, pattern))
    if pattern in ("sparse", "random"):
        assert ranks != planted_ranks(pattern, planter.sites, budget, rng_for(1, pattern))


def test_patterns_put_rank_where_they_say(planter: Planter) -> None:
    budget = uniform_cost(planter.sites, 3)

    def mean(pattern: str, inside: object) -> tuple[float, float]:
        ranks = planted_ranks(pattern, planter.sites, budget, rng_for(0, pattern))
        chosen = [ranks[site.name] for site in planter.sites if inside(site)]  # type: ignore[operator]
        others = [ranks[site.name] for site in planter.sites if not inside(site)]  # type: ignore[operator]
        return float(np.mean(chosen)), float(np.mean(others))

    last = max(site.layer for site in planter.sites)
    for pattern, inside in (
        ("early", lambda site: site.layer == 0),
        ("late", lambda site: site.layer == last),
        ("one_family", lambda site: site.role in ATTENTION_ROLES),
    ):
        here, elsewhere = mean(pattern, inside)
        assert here > 2 * elsewhere
    flat = planted_ranks("flat", planter.sites, budget, rng_for(0, "flat"))
    assert set(flat.values()) == {3}


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
def test_the_change_has_the_planted_rank_and_energy(planter: Planter, spectrum: str) -> None:
    model = planter.base.model
    ranks = {site.name: 1 + index % 4 for index, site in enumerate(planter.sites)}
    changes = planted_changes(model, planter.sites, ranks, spectrum, seed=0)
    modules = dict(model.named_modules())
    for site in planter.sites:
        change, weight = changes[site.name].double(), modules[site.name].weight.double()
        assert change.shape == (site.out_features, site.in_features)
        values = torch.linalg.svdvals(change)
        planted = ranks[site.name]
        if spectrum == "noisy":
            top = float((values[:planted] ** 2).sum() / (values**2).sum())
            assert top == pytest.approx(1 / 1.1, rel=1e-3)
        else:
            assert int((values > 1e-5 * values[0]).sum()) == planted
        unit = float((weight**2).sum()) / site.max_rank
        assert float((values**2).sum()) == pytest.approx(planted * unit, rel=1e-4)
        assert planted_energy(spectrum, planted, site.max_rank).sum() == pytest.approx(planted)


def test_teacher_is_at_the_distance_and_the_base_is_untouched(planter: Planter) -> None:
    model = planter.base.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = written_by(model, count=8, length=12, start=planter.start, seed=0, purpose="base")
    batch = collate(texts, planter.start)
    ranks = dict.fromkeys((site.name for site in planter.sites), 2)
    changes = planted_changes(model, planter.sites, ranks, "flat", seed=0)
    teacher, scale = make_teacher(model, planter.sites, changes, batch, 0.005)
    with torch.no_grad():
        kl = token_kl(predict(teacher, batch), predict(model, batch))
    assert float(kl.sum()) / batch.supervised_tokens == pytest.approx(0.005, rel=0.011)
    name = planter.sites[0].name
    added = teacher.get_submodule(name).weight - model.get_submodule(name).weight
    torch.testing.assert_close(added, scale * changes[name].T, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ModelError, match="smaller --distance"):
        make_teacher(model, planter.sites, changes, batch, 1e6)


def test_kl_equals_its_definition(planter: Planter) -> None:
    texts = written_by(planter.base.model, count=3, length=6, start=planter.start, seed=0, purpose="x")
    batch = collate(texts, planter.start)
    with torch.no_grad():
        found = predict(planter.base.model, batch)
        other = type(found)(logits=found.logits.flip(-1), targets=found.targets)
    p, q = (x.logits.double().softmax(-1) for x in (other, found))
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(token_kl(other, found).double(), expected, atol=1e-5, rtol=1e-5)
    assert float(token_kl(found, found).abs().max()) < 1e-6


def test_texts_start_and_end_as_asked_and_follow_the_seed(planter: Planter) -> None:
    def write(seed: int) -> list[tuple[int, ...]]:
        texts = written_by(planter.base.model, count=4, length=9, start=planter.start, seed=seed, purpose="x")
        return [text.input_ids for text in texts]

    assert all(len(ids) == 10 and ids[0] == planter.start for ids in write(0))
    assert write(0) == write(0)
    assert write(0) != write(1)


def test_a_model_equal_to_the_teacher_is_at_distance_zero(planter: Planter) -> None:
    texts = written_by(planter.base.model, count=8, length=6, start=planter.start, seed=0, purpose="x")
    from adaptive_lora.models.tasks.prepared import PreparedSplits

    parts = PreparedSplits(train=texts, validation=texts, test=texts)
    model = planter.base.model
    context = PlantedContext(planter.study, planter.runtime, planter.base, model, parts)
    assert abs(context.losses(model, texts).loss) < 1e-6


def test_benchmark_runs_resumes_and_reports(config: PlantedConfig, tmp_path: Path) -> None:
    words = ["planted", "--json"]
    for name in ("model", "distance", "examples", "test_examples", "length", "steps", "output"):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += ["--patterns", "sparse flat", "--methods", " ".join(config.methods)]
    words += ["--seeds", "0 1", "--batch-size", "4", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    first = CliRunner().invoke(main, words, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert len(list((tmp_path / "out" / "planted-cells").iterdir())) == 2 * 2 * 4
    again = CliRunner().invoke(main, words, catch_exceptions=False)
    assert json.loads(again.stdout) == found
    assert "cell" not in again.stderr  # nothing was run again
    rows = {(row["pattern"], row["method"]): row for row in found["findings"]}
    assert rows["sparse", ORACLE]["rank_correlation"] == pytest.approx(1.0)
    assert rows["sparse", ORACLE]["captured_energy"] == pytest.approx(1.0)
    assert rows["flat", ORACLE]["difference"] == 0  # the oracle of flat is uniform itself
    assert rows["sparse", "empirical-r16"]["captured_energy"] < 1
    written = {path.name for path in (tmp_path / "out" / "planted").iterdir()}
    assert written == {"planted.json", "planted.md", "planted.png", "planted.pdf"}


def cell(method: str, seed: int, kl: float, pattern: str = "sparse") -> CellResult:
    """Return a cell with nothing but a distance."""
    return CellResult(
        pattern=pattern, spectrum="flat", seed=seed, method=method, kl=kl, base_kl=1.0,
        rank_correlation=None, captured_energy=0.5, parameters=100, seconds=1.0, ranks={},
    )  # fmt: skip


def test_findings_say_wins_and_losses_plainly() -> None:
    cells = []
    for seed in range(8):
        noise = 0.01 * seed
        cells += [
            cell(UNIFORM, seed, 0.5 + noise),
            cell(ORACLE, seed, 0.3 + noise),
            cell("good", seed, 0.4 + noise + 0.001 * (seed % 2)),
            cell("bad", seed, 0.6 + noise),
            cell("same", seed, 0.5 + noise + 0.01 * (-1) ** seed),
        ]
    cells.append(cell("good", 99, 0.0))  # unpaired: the others have no such seed
    found = conclude(cells)
    by = {finding.method: finding for finding in found.findings}
    assert by["good"].seeds == tuple(range(8))
    assert by["good"].outcome is Outcome.BETTER
    assert by["good"].recovered == pytest.approx((0.5 - 0.4005) / 0.2)
    assert by[ORACLE].recovered == pytest.approx(1.0)
    assert by["bad"].outcome is Outcome.WORSE
    assert by["bad"].recovered == pytest.approx(-0.5)
    assert by["bad"].p == pytest.approx(2 / 2**8)
    assert by["same"].outcome is Outcome.OPEN
    assert any(s.startswith("bad loses to uniform under sparse/flat") for s in found.sentences)


def test_without_a_better_oracle_nothing_is_called_recovered() -> None:
    cells = [cell(m, seed, 0.5) for seed in range(8) for m in (UNIFORM, ORACLE, "other")]
    assert {finding.recovered for finding in conclude(cells).findings} == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": "spares"}, "must be one of"),
        ({"methods": "empirical empirical"}, "given more than once"),
        ({"seeds": ""}, "at least one"),
        ({"budget": "12"}, "too small"),
        ({"budget": "much"}, "whole number of parameters"),
        ({"model": "./nowhere"}, "does not exist"),
        ({"steps": "0", "lr": "-1"}, "lr must be above 0"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(
    changes: dict[str, str], message: str, tmp_path: Path, base_folder: Path
) -> None:
    options = {"model": str(base_folder), **changes}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    result = CliRunner().invoke(main, ["planted", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_all_problems_of_the_settings_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        read_options(PlantedConfig, {"stepz": 3, "lr": "fast", "length": 1})
    text = str(raised.value)
    assert "did you mean 'steps'" in text
    assert "expected a number" in text
    assert "length must be at least 2" in text
