"""From finished trials to a verdict, a report and a champion in the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from rich.console import Console

from adaptive_lora.comparison import Comparison, compare
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdapterError, DataError
from adaptive_lora.provenance import provenance
from adaptive_lora.report import About, render_markdown, render_terminal, write_report
from adaptive_lora.results import TrialRecord
from adaptive_lora.stats import Correction
from adaptive_lora.tracking import (
    RegisteredAdapter,
    Run,
    StudyRun,
    promote,
    read_trials,
    register,
)
from adaptive_lora.tracking.registry import MODEL_TAG
from adaptive_lora.tracking.runs import SIGNATURE
from adaptive_lora.verification import prove
from adaptive_lora.workbench import Workbench


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a study found."""

    study_id: str
    comparison: Comparison
    report: Path
    champion: RegisteredAdapter | None
    """The registered winner, or None with `no_champion` saying why."""
    no_champion: str = ""


def judge(bench: Workbench, study: StudyRun, config: StudyConfig, console: Console) -> Judgement:
    """Compare the trials of the grid, write and log the report, register the winner.

    Raises:
        DataError: no trial finished.
    """
    runs = _runs(bench, study, config)
    records = read_trials(study.store, runs)
    _check_any_finished(study, records)
    facts = _facts(bench, study)
    comparison = compare(
        records,
        baseline=config.baseline_label,
        frozen={fold: bench.frozen(fold) for fold in range(config.data.folds)},
        margin=config.margin,
        margin_share=config.margin_percent / 100,
        correction=cast(Correction, config.correction),
        facts=facts,
    )
    folder = Path(config.tracking.output) / study.study_id
    report = write_report(
        comparison,
        records,
        folder,
        About(
            title=f"Study {config.study}",
            facts=facts,
            examples={example.id: example.prompt for example in bench.data.examples},
        ),
    )
    render_terminal(comparison, console)
    study.files(folder, "report")
    study.describe(render_markdown(comparison))
    try:
        champion, reason = _register(bench, study, config, comparison, records), ""
    except AdapterError as error:
        champion, reason = None, str(error)
    return Judgement(
        study_id=study.study_id,
        comparison=comparison,
        report=report,
        champion=champion,
        no_champion=reason,
    )


def _runs(bench: Workbench, study: StudyRun, config: StudyConfig) -> list[Run]:
    """Return the runs of this grid: the finished run of each trial, or else its last failed one."""
    wanted = {trial.signature(bench.surroundings) for trial in config.trials()}
    chosen: dict[str, Run] = {}
    for run in reversed(study.children()):  # oldest first, so that later ones replace them
        signature = run.data.tags.get(SIGNATURE)
        if signature in wanted and (signature not in chosen or run.info.status == "FINISHED"):
            chosen[signature] = run
    return list(chosen.values())


def _check_any_finished(study: StudyRun, records: list[TrialRecord]) -> None:
    if not any(record.status == "FINISHED" for record in records):
        reasons = sorted({record.reason for record in records})
        raise DataError(
            f"study {study.study_id} has no finished trial to compare"
            + (f"; all failed: {'; '.join(reasons)}" if reasons else "; run `adaptive-lora study`.")
        )


def _facts(bench: Workbench, study: StudyRun) -> Mapping[str, str]:
    base = bench.base.reference
    return {
        "study id": study.study_id,
        "tracking store": study.store.shown_uri,
        "base model": f"{base.name} ({base.content_hash[:16]})",
        "data": f"{bench.data.source}, {len(bench.data.examples):,} examples ({bench.data.digest})",
        "precision": bench.runtime.precision,
        **provenance(),
        "settings": json.dumps(bench.settings()),
    }


def _register(
    bench: Workbench,
    study: StudyRun,
    config: StudyConfig,
    comparison: Comparison,
    records: list[TrialRecord],
) -> RegisteredAdapter:
    """Prove, register and promote the winner's best trial by validation loss."""
    winner = comparison.method(comparison.winner)
    trials = [
        record
        for record in records
        if record.status == "FINISHED" and record.method == winner.label and record.lr == winner.lr
    ]
    best = min(trials, key=lambda record: record.validation_loss)
    run = study.store.client.get_run(best.run_id)
    proof = prove(bench, best, run.data.tags[MODEL_TAG])
    adapter = register(study.store, config.tracking.registered_model, run)
    tests = None if winner.difference is None else winner.difference.tests
    promote(
        study.store,
        adapter,
        {
            "headline": comparison.headline,
            "decision": comparison.decision,
            "verdict": winner.verdict.text,
            "method": best.method,
            "baseline": comparison.baseline,
            "n_seeds": str(len(winner.seeds)),
            "p_value": "none (the baseline itself)" if tests is None else f"{tests.sign_flip:.4g}",
            "p_value_holm": "none" if tests is None else f"{tests.holm:.4g}",
            "study_id": study.study_id,
            "decided_by_run": study.run_id,
            "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "reload_max_logit_difference": repr(proof.max_logit_difference),
            "reload_max_loss_difference": repr(proof.max_loss_difference),
            "base_hash": bench.base.reference.content_hash,
        },
    )
    return adapter
