"""Which method recovers what, and when: the cells of the benchmark as numbers and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.jsonable import jsonable
from adaptive_lora.results import FloatArray
from adaptive_lora.study.planted.cell import ORACLE, UNIFORM, CellResult

CONFIDENCE = 0.95


class Outcome(StrEnum):
    """What may be said about a method against uniform."""

    BETTER = "better"
    WORSE = "loses to uniform"
    OPEN = "no difference shown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One method under one pattern and spectrum, paired with uniform by seed."""

    pattern: str
    spectrum: str
    method: str
    seeds: tuple[int, ...]
    kl: float
    """Mean KL(teacher || model) over seeds, in nats per token."""
    difference: float
    """Mean KL of the method minus that of uniform; below zero is better."""
    interval: stats.Interval
    p: float
    """Exact sign-flip test against uniform."""
    p_corrected: float
    """Step-down max-T over all methods of the pattern and spectrum, the oracle included."""
    recovered: float | None
    """(uniform - method) / (uniform - oracle) in mean KL: 0 is uniform, 1 the oracle. None where
    the oracle itself is not better than uniform."""
    rank_correlation: float | None
    """Mean over the seeds where it exists."""
    captured_energy: float
    parameters: float
    seconds: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedFindings:
    """The answer of the benchmark."""

    findings: tuple[Finding, ...]
    uniform: Mapping[str, float]
    """`pattern spectrum` -> mean KL of uniform."""
    base: Mapping[str, float]
    """`pattern spectrum` -> mean KL of the base without adapter."""
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        values: dict[str, Any] = jsonable(self)
        return values


def conclude(results: Sequence[CellResult]) -> PlantedFindings:
    """Compare every method with uniform within each pattern and spectrum.

    Only seeds in which every method finished are counted, so that all differences are paired.
    """
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.pattern, result.spectrum), []).append(result)
    findings: list[Finding] = []
    for group in groups.values():
        findings += _compare(group)
    means = {
        f"{pattern} {spectrum}": (
            float(np.mean([r.kl for r in group if r.method == UNIFORM])),
            float(np.mean([r.base_kl for r in group if r.method == UNIFORM])),
        )
        for (pattern, spectrum), group in groups.items()
    }
    return PlantedFindings(
        findings=tuple(findings),
        uniform={name: mean for name, (mean, _) in means.items()},
        base={name: mean for name, (_, mean) in means.items()},
        sentences=tuple(_sentences(findings)),
    )


def _compare(group: Sequence[CellResult]) -> list[Finding]:
    table = {(result.method, result.seed): result for result in group}
    methods = list(dict.fromkeys(result.method for result in group))
    seeds = [
        seed for seed in sorted({result.seed for result in group}) if all((method, seed) in table for method in methods)
    ]
    if not seeds:
        return []
    others = [method for method in methods if method != UNIFORM]
    kl_SM = np.array([[table[m, seed].kl for m in others] for seed in seeds])
    base_S = np.array([table[UNIFORM, seed].kl for seed in seeds])
    diff_SM: FloatArray = kl_SM - base_S[:, None]
    corrected_M = stats.step_down_max_t(diff_SM)
    gap = -float(diff_SM[:, others.index(ORACLE)].mean())
    oracle_better = gap > 0 and float(corrected_M[others.index(ORACLE)]) <= 1 - CONFIDENCE
    return [
        _finding(
            [table[method, seed] for seed in seeds],
            diff_SM[:, index],
            float(corrected_M[index]),
            gap if oracle_better else None,
        )
        for index, method in enumerate(others)
    ]


def _finding(cells: Sequence[CellResult], diff_S: FloatArray, corrected: float, gap: float | None) -> Finding:
    mean = float(diff_S.mean())
    known = [cell.rank_correlation for cell in cells if cell.rank_correlation is not None]
    sure = corrected <= round(1 - CONFIDENCE, 12)
    return Finding(
        pattern=cells[0].pattern,
        spectrum=cells[0].spectrum,
        method=cells[0].method,
        seeds=tuple(cell.seed for cell in cells),
        kl=float(np.mean([cell.kl for cell in cells])),
        difference=mean,
        interval=stats.mean_interval(diff_S, confidence=CONFIDENCE),
        p=stats.sign_flip_test(diff_S),
        p_corrected=corrected,
        recovered=None if gap is None else -mean / gap,
        rank_correlation=float(np.mean(known)) if known else None,
        captured_energy=float(np.mean([cell.captured_energy for cell in cells])),
        parameters=float(np.mean([cell.parameters for cell in cells])),
        seconds=float(np.mean([cell.seconds for cell in cells])),
        outcome=(Outcome.OPEN if not sure else Outcome.BETTER if mean < 0 else Outcome.WORSE),
    )


def _sentences(findings: Sequence[Finding]) -> list[str]:
    """Say for every method where it wins, loses and shows nothing, losses as plainly as wins."""
    said = []
    for method in dict.fromkeys(finding.method for finding in findings):
        own = [finding for finding in findings if finding.method == method]
        parts = []
        for outcome, verb in (
            (Outcome.BETTER, "is better than uniform under"),
            (Outcome.WORSE, "loses to uniform under"),
            (Outcome.OPEN, "shows no difference to uniform under"),
        ):
            places = [_place(finding) for finding in own if finding.outcome is outcome]
            if places:
                parts.append(f"{verb} {', '.join(places)}")
        said.append(f"{method} {'; '.join(parts)}.")
    return said


def _place(finding: Finding) -> str:
    share = "" if finding.recovered is None else f" ({finding.recovered:+.0%} of the oracle's gain)"
    return f"{finding.pattern}/{finding.spectrum}{share}"
