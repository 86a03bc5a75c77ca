"""One cell of the planted benchmark: a pattern, a spectrum and a seed, learned by every method."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from adaptive_lora.allocation import MethodSpec, RankPlan
from adaptive_lora.allocation.allocate import resolve_budget
from adaptive_lora.allocation.plan import SiteRank
from adaptive_lora.allocation.scaling import Scaling
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config import TrainConfig, TrialSpec
from adaptive_lora.data import TokenizedExample, collate
from adaptive_lora.errors import DataError, brief
from adaptive_lora.models.base import BaseModel, load_base
from adaptive_lora.models.device import Runtime, start_runtime
from adaptive_lora.models.sites import find_sites
from adaptive_lora.models.tasks.prepared import PreparedSplits
from adaptive_lora.seeding import rng_for
from adaptive_lora.study.planted.config import PlantedConfig
from adaptive_lora.study.planted.context import PlantedContext
from adaptive_lora.study.planted.patterns import planted_energy, planted_ranks
from adaptive_lora.study.planted.teacher import make_teacher, planted_changes, written_by
from adaptive_lora.study.trial_context import TrialOnBase

ORACLE, UNIFORM = "oracle", "uniform"
_REFERENCE_TEXTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """What one method made of one planted change."""

    pattern: str
    spectrum: str
    seed: int
    method: str
    """Label of the method, `uniform` or `oracle`."""
    kl: float
    """KL(teacher || trained model) on held-out text of the teacher, in nats per token."""
    base_kl: float
    """The same of the base without adapter."""
    rank_correlation: float | None
    """Spearman correlation of its ranks with the planted ones; None where either has no spread."""
    captured_energy: float
    """Share of the planted squared singular values that its ranks have room for."""
    parameters: int
    """Of the trained adapter as it is in the end."""
    seconds: float
    """Profiling and training."""
    ranks: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A finished training."""

    kl: float
    plan: RankPlan
    seconds: float


class Planter:
    """Makes the cells of a benchmark over one base."""

    def __init__(self, config: PlantedConfig) -> None:
        """Load the base and find out whether the budget can be planted.

        Raises:
            AdaptiveLoraError: base, precision or budget cannot be used.
        """
        self.config = config
        self.study = config.study()
        self.runtime: Runtime = start_runtime(config.precision)
        self.base: BaseModel = load_base(self.study.model, self.runtime.base_dtype)
        self.base.model.to(self.runtime.device)  # type: ignore[arg-type]
        self.sites = find_sites(self.base.model)
        budget = resolve_budget(config.uniform.budget, self.sites)
        assert budget is not None  # the uniform method of a benchmark always has one
        self.budget = budget
        for pattern in config.patterns:
            planted_ranks(pattern, self.sites, self.budget, rng_for(0, "planted", pattern))

    @property
    def start(self) -> int:
        """Token that every text starts with."""
        return int(self.base.tokenizer.eos_token_id)

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """Yield (pattern, spectrum, seed), the seed outermost: early results are paired."""
        for seed in self.config.seeds:
            for pattern in self.config.patterns:
                for spectrum in self.config.spectra:
                    yield pattern, spectrum, seed

    def run(self, pattern: str, spectrum: str, seed: int, done: Callable[[CellResult], None]) -> list[CellResult]:
        """Run what is missing of a cell; every method's result is kept as soon as it is there."""
        arms: list[tuple[str, MethodSpec]] = [
            (UNIFORM, self.config.uniform),
            (ORACLE, self.config.uniform),
            *self.config.arms.items(),
        ]
        kept = [self._read(pattern, spectrum, seed, label) for label, _ in arms]
        if all(kept):
            return [result for result in kept if result]
        ranks = planted_ranks(pattern, self.sites, self.budget, rng_for(seed, "planted", pattern))
        context, base_kl = self._context(spectrum, seed, ranks, f"{pattern} {spectrum}")
        results: list[CellResult] = []
        for (label, spec), result in zip(arms, kept, strict=True):
            if result is None and label == ORACLE and ranks == results[0].ranks:
                result = dataclasses.replace(results[0], method=ORACLE)  # the truth is uniform
                self._write(result)
            if result is None:
                truth = _plan_of(ranks, self.sites, self.budget, self.study.train)
                run = self._train(context, spec, seed, truth if label == ORACLE else None)
                result = CellResult(
                    pattern=pattern,
                    spectrum=spectrum,
                    seed=seed,
                    method=label,
                    kl=run.kl,
                    base_kl=base_kl,
                    rank_correlation=_rank_correlation(run.plan, ranks),
                    captured_energy=_captured_energy(run.plan, ranks, self.sites, spectrum),
                    parameters=run.plan.trainable_parameters,
                    seconds=run.seconds,
                    ranks=run.plan.rank_pattern(),
                )
                self._write(result)
                done(result)
            results.append(result)
        return results

    def _context(self, spectrum: str, seed: int, ranks: Mapping[str, int], name: str) -> tuple[PlantedContext, float]:
        """Make the teacher and let it write; return the bench and the base's distance."""
        config, base = self.config, self.base.model

        def texts(model: PreTrainedModel, count: int, purpose: str) -> tuple[TokenizedExample, ...]:
            return written_by(
                model, count=count, length=config.length, start=self.start, seed=seed, purpose=f"{purpose} {name}"
            )

        reference = collate(texts(base, _REFERENCE_TEXTS, "base"), self.start)
        changes = planted_changes(base, self.sites, ranks, spectrum, seed)
        teacher, _ = make_teacher(base, self.sites, changes, reference.to(self.runtime.device), config.distance)
        test = texts(teacher, config.test_examples, "test")
        splits = PreparedSplits(train=texts(teacher, config.examples, "train"), validation=test[:8], test=test)
        context = PlantedContext(self.study, self.runtime, self.base, teacher, splits)
        return context, context.losses(base, test).loss

    def _train(self, context: PlantedContext, spec: MethodSpec, seed: int, truth: RankPlan | None) -> _Run:
        """Run a method as a study would; `truth` is the plan of the oracle."""
        started = time.perf_counter()
        trial = TrialSpec(study=self.study, method=spec, seed=seed, fold=0, lr=self.config.lr)
        job = TrialOnBase(context, trial, lambda event: None)
        try:
            if truth is not None:
                job.plan = truth
            trained = spec.options.fit(job)
            kl = context.losses(trained.model, context.splits(0).test).loss
        finally:
            job.release()
        assert isinstance(trained.plan, RankPlan)
        return _Run(kl=kl, plan=trained.plan, seconds=time.perf_counter() - started)

    def _path(self, pattern: str, spectrum: str, seed: int, method: str) -> Path:
        fingerprint = {"base": self.base.reference.content_hash, "precision": self.runtime.precision}
        cell = {"pattern": pattern, "spectrum": spectrum, "seed": seed, "method": method}
        key = self.config.cell_key({**cell, **fingerprint})
        return Path(self.config.output) / "planted-cells" / f"{key}.json"

    def _read(self, pattern: str, spectrum: str, seed: int, method: str) -> CellResult | None:
        path = self._path(pattern, spectrum, seed, method)
        if not path.is_file():
            return None
        try:
            return CellResult(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not as it was written ({brief(error)}); remove it, and the same command measures it again."
            ) from error

    def _write(self, result: CellResult) -> None:
        """Write a result whole or not at all."""
        path = self._path(result.pattern, result.spectrum, result.seed, result.method)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(result), indent=1, allow_nan=False), encoding="utf-8")
        partial.replace(path)


def _plan_of(ranks: Mapping[str, int], sites: tuple[AdapterSite, ...], budget: int, train: TrainConfig) -> RankPlan:
    scaling = Scaling(train.scaling)
    return RankPlan(
        method=ORACLE,
        budget=budget,
        scaling=scaling,
        entries=tuple(
            SiteRank(site=site, rank=ranks[site.name], alpha=scaling.alpha_at(train.alpha, ranks[site.name]))
            for site in sites
        ),
    )


def _rank_correlation(plan: RankPlan, planted: Mapping[str, int]) -> float | None:
    found = plan.rank_pattern()
    mine, truth = [found.get(name, 0) for name in planted], list(planted.values())
    if not (np.ptp(mine) and np.ptp(truth)):
        return None
    return float(spearmanr(mine, truth).statistic)


def _captured_energy(plan: RankPlan, planted: Mapping[str, int], sites: Sequence[AdapterSite], spectrum: str) -> float:
    found, captured, total = plan.rank_pattern(), 0.0, 0.0
    for site in sites:
        energy = planted_energy(spectrum, planted[site.name], site.max_rank)
        captured += float(energy[: found.get(site.name, 0)].sum())
        total += float(energy.sum())
    return captured / total
