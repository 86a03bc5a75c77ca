"""From finished trials to a verdict, a report and a champion in the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from rich.console import Console

from adaptive_lora.analysis.comparison import Comparison, MethodSummary, compare
from adaptive_lora.analysis.report import About, render_markdown, render_terminal, write_report
from adaptive_lora.analysis.stats import Correction
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdapterError
from adaptive_lora.results import TrialRecord
from adaptive_lora.study.comparison_input import Dossier
from adaptive_lora.study.context import Workbench
from adaptive_lora.study.verify import prove
from adaptive_lora.tracking import RegisteredAdapter, promote, register
from adaptive_lora.tracking.registry import MODEL_TAG


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a study found."""

    study_id: str
    comparison: Comparison
    report: Path
    champion: RegisteredAdapter | None
    """The registered winner, or None with `no_champion` saying why."""
    no_champion: str = ""


def judge(
    dossier: Dossier, config: StudyConfig, console: Console, bench_for: Callable[[TrialRecord], Workbench]
) -> Judgement:
    """Compare trials, write and log the report, register the winner.

    Args:
        dossier: the trials, read from the store.
        config: baseline, margin, correction, output folder and registered model.
        console: where the table goes.
        bench_for: loads base and data of a trial for the proof of its adapter; an error there
            leaves the registration out and nothing else.
    """
    comparison = compare_dossier(dossier, config, config.baseline)
    folder = Path(config.tracking.output) / dossier.name
    report = write_report(
        comparison, dossier.records, folder, About(title=dossier.title, examples=dossier.examples, data=dossier.data)
    )
    render_terminal(comparison, console)
    dossier.home.files(folder, "report")
    dossier.home.describe(render_markdown(comparison, dossier.title))
    _summarise(dossier, comparison)
    try:
        if dossier.mixed:
            raise AdapterError(
                "trials of several data sets, splits or bases were compared, so there is no one adapter to register."
            )
        champion, reason = _register(dossier, config, comparison, bench_for), ""
    except AdapterError as error:
        champion, reason = None, str(error)
    return Judgement(study_id=dossier.name, comparison=comparison, report=report, champion=champion, no_champion=reason)


def compare_dossier(dossier: Dossier, config: StudyConfig, baseline: str | None) -> Comparison:
    """Return the comparison alone, without writing anything."""
    comparison = compare(
        dossier.records,
        baseline=dossier.baseline(baseline),
        frozen=dossier.frozen,
        margin=config.margin,
        margin_share=config.margin_percent / 100,
        correction=cast(Correction, config.correction),
        facts=dossier.facts,
    )
    notes = (*comparison.notes, *_mixed_notes(dossier.mixed))
    return dataclasses.replace(comparison, notes=notes)


def _mixed_notes(mixed: tuple[str, ...]) -> tuple[str, ...]:
    if not mixed:
        return ()
    return (
        f"Trials of several kinds were pooled as asked ({'; '.join(mixed)}): pairs are formed "
        "within each kind only, whose seeds are numbered from 0, 10,000, 20,000 ...; without one "
        "frozen base no margin follows by itself.",
    )


def _register(
    dossier: Dossier, config: StudyConfig, comparison: Comparison, bench_for: Callable[[TrialRecord], Workbench]
) -> RegisteredAdapter:
    """Prove, register and promote the winner's best trial by validation loss."""
    store = dossier.store
    winner = comparison.method(comparison.winner)
    trials = [
        record
        for record in dossier.records
        if record.status == "FINISHED" and record.method == winner.label and record.lr == winner.lr
    ]
    best = min(trials, key=lambda record: record.validation_loss)
    bench = bench_for(best)
    run = store.client.get_run(best.run_id)
    proof = prove(bench, best, run.data.tags[MODEL_TAG])
    adapter = register(store, config.tracking.registered_model, run)
    tests = None if winner.difference is None else winner.difference.tests
    promote(
        store,
        adapter,
        {
            "headline": comparison.headline,
            "decision": comparison.decision,
            "verdict": winner.verdict.text,
            "method": best.method,
            "baseline": comparison.baseline,
            "n_seeds": str(len(winner.seeds)),
            "p_value": "none (the baseline itself)" if tests is None else f"{tests.sign_flip:.4g}",
            "p_value_corrected": _corrected_p(comparison, winner),
            "correction": comparison.correction,
            "study_id": dossier.name,
            "decided_by_run": dossier.home.run_id,
            "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "reload_max_logit_difference": repr(proof.max_logit_difference),
            "reload_max_loss_difference": repr(proof.max_loss_difference),
            "base_hash": bench.base.reference.content_hash,
        },
        _version_text(dossier, config, comparison, best),
    )
    return adapter


def _version_text(dossier: Dossier, config: StudyConfig, comparison: Comparison, best: TrialRecord) -> str:
    """Return a version's description in Markdown: what it is, why it is champion, how to load it.

    A version lists its tags by the alphabet, so that the decision stands somewhere in the middle.
    """
    assert best.test is not None
    exact = "" if best.test.exact_match is None else f", exact match {best.test.exact_match:.1%}"
    return (
        f"**{best.method}**, seed {best.seed}, learning rate {best.lr:g}: test loss "
        f"{best.test.loss:.4f} {comparison.unit}{exact}, {best.trainable_parameters:,} "
        "parameters.\n\n"
        f"Champion of {dossier.title}: {comparison.decision}.\n\n{comparison.headline}\n\n"
        f"```python\nadapter = mlflow.pyfunc.load_model("
        f'"models:/{config.tracking.registered_model}@champion")\n```'
    )


def _summarise(dossier: Dossier, comparison: Comparison) -> None:
    """Put the outcome into tags and metrics, which the tables of runs can show and sort."""
    base, winner = comparison.methods[0], comparison.method(comparison.winner)
    dossier.home.tags({"verdict": comparison.answer[:5000], "champion": comparison.winner})
    means = {"study/baseline_test_loss": base.loss.mean, "study/champion_test_loss": winner.loss.mean}
    for name, value in means.items():
        if value is not None:
            dossier.home.metric(name, value)
    dossier.home.flush()


def _corrected_p(comparison: Comparison, winner: MethodSummary) -> str:
    if winner.difference is None:
        return "none (the baseline itself)"
    return f"{comparison.deciding_p(winner.difference):.4g}"
