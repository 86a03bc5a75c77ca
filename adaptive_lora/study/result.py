"""The result of a study: comparison, report and champion in the registry."""

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
from adaptive_lora.study.comparison_input import ComparisonInput
from adaptive_lora.study.context import StudyContext
from adaptive_lora.study.verify import prove
from adaptive_lora.tracking import RegisteredAdapter, promote, register
from adaptive_lora.tracking.registry import MODEL_TAG


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """Result of a study: comparison, report and champion."""

    study_id: str
    comparison: Comparison
    report: Path
    champion: RegisteredAdapter | None
    """The registered winner, or None with the reason in `no_champion`."""
    no_champion: str = ""


def judge(
    comparison_input: ComparisonInput,
    config: StudyConfig,
    console: Console,
    context_for: Callable[[TrialRecord], StudyContext],
) -> StudyResult:
    """Compare trials, write and log the report, register the winner.

    Args:
        comparison_input: the trials, read from the store.
        config: baseline, margin, correction, output folder and registered model.
        console: console for the table.
        context_for: function that loads base and data of a trial for the proof of its adapter; an
            error in it only prevents the registration.
    """
    comparison = compare_input(comparison_input, config, config.baseline)
    folder = Path(config.tracking.output) / comparison_input.name
    report = write_report(
        comparison,
        comparison_input.records,
        folder,
        About(title=comparison_input.title, examples=comparison_input.examples, data=comparison_input.data),
    )
    render_terminal(comparison, console)
    comparison_input.home.files(folder, "report")
    comparison_input.home.describe(render_markdown(comparison, comparison_input.title))
    _summarise(comparison_input, comparison)
    try:
        if comparison_input.mixed:
            raise AdapterError(
                "trials of several data sets, splits or bases were compared, so there is no one adapter to register."
            )
        champion, reason = _register(comparison_input, config, comparison, context_for), ""
    except AdapterError as error:
        champion, reason = None, str(error)
    return StudyResult(
        study_id=comparison_input.name, comparison=comparison, report=report, champion=champion, no_champion=reason
    )


def compare_input(comparison_input: ComparisonInput, config: StudyConfig, baseline: str | None) -> Comparison:
    """Return the comparison without writing anything."""
    comparison = compare(
        comparison_input.records,
        baseline=comparison_input.baseline(baseline),
        base_scores=comparison_input.base_scores,
        margin=config.margin,
        margin_share=config.margin_percent / 100,
        correction=cast(Correction, config.correction),
        facts=comparison_input.facts,
    )
    notes = (*comparison.notes, *_mixed_notes(comparison_input.mixed))
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
    comparison_input: ComparisonInput,
    config: StudyConfig,
    comparison: Comparison,
    context_for: Callable[[TrialRecord], StudyContext],
) -> RegisteredAdapter:
    """Prove, register and promote the winner's best trial by validation loss."""
    store = comparison_input.store
    winner = comparison.method(comparison.winner)
    trials = [
        record
        for record in comparison_input.records
        if record.status == "FINISHED" and record.method == winner.label and record.lr == winner.lr
    ]
    best = min(trials, key=lambda record: record.validation_loss)
    context = context_for(best)
    run = store.client.get_run(best.run_id)
    proof = prove(context, best, run.data.tags[MODEL_TAG])
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
            "study_id": comparison_input.name,
            "decided_by_run": comparison_input.home.run_id,
            "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "reload_max_logit_difference": repr(proof.max_logit_difference),
            "reload_max_loss_difference": repr(proof.max_loss_difference),
            "base_hash": context.base.reference.content_hash,
        },
        _version_text(comparison_input, config, comparison, best),
    )
    return adapter


def _version_text(
    comparison_input: ComparisonInput, config: StudyConfig, comparison: Comparison, best: TrialRecord
) -> str:
    """Return a version's description in Markdown: method, decision, and loading code.

    MLflow lists a version's tags alphabetically, so that the decision is not prominent among them.
    """
    assert best.test is not None
    exact = "" if best.test.exact_match is None else f", exact match {best.test.exact_match:.1%}"
    return (
        f"**{best.method}**, seed {best.seed}, learning rate {best.lr:g}: test loss "
        f"{best.test.loss:.4f} {comparison.unit}{exact}, {best.trainable_parameters:,} "
        "parameters.\n\n"
        f"Champion of {comparison_input.title}: {comparison.decision}.\n\n{comparison.headline}\n\n"
        f"```python\nadapter = mlflow.pyfunc.load_model("
        f'"models:/{config.tracking.registered_model}@champion")\n```'
    )


def _summarise(comparison_input: ComparisonInput, comparison: Comparison) -> None:
    """Log the outcome as tags and metrics, which tables of runs can show and sort."""
    base, winner = comparison.methods[0], comparison.method(comparison.winner)
    comparison_input.home.tags({"verdict": comparison.answer[:5000], "champion": comparison.winner})
    means = {"study/baseline_test_loss": base.loss.mean, "study/champion_test_loss": winner.loss.mean}
    for name, value in means.items():
        if value is not None:
            comparison_input.home.metric(name, value)
    comparison_input.home.flush()


def _corrected_p(comparison: Comparison, winner: MethodSummary) -> str:
    if winner.difference is None:
        return "none (the baseline itself)"
    return f"{comparison.deciding_p(winner.difference):.4g}"
