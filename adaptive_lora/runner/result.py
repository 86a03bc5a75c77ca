"""The result of a study: comparison, report, and the proven champion in the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.analysis.comparison import Comparison, MethodSummary, compare
from adaptive_lora.analysis.comparison.forgetting import ForgettingBound
from adaptive_lora.analysis.comparison.headroom import headroom_of
from adaptive_lora.analysis.comparison.ladder import with_ladder
from adaptive_lora.analysis.comparison.types import NO_WINNER
from adaptive_lora.analysis.comparison.wording import interval_clause, plain, signed
from adaptive_lora.analysis.report import PAGE, About, ComparisonResult, render_markdown, render_terminal, write_report
from adaptive_lora.analysis.report.tables import stored_table
from adaptive_lora.analysis.stats import Correction
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.errors import AdapterError
from adaptive_lora.models.errors import is_bug
from adaptive_lora.results import TrialRecord
from adaptive_lora.runner.comparison_input import ComparisonInput
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.follow import reloaded_together
from adaptive_lora.runner.trial import PROBE, probe_logits
from adaptive_lora.serving import load_adapter
from adaptive_lora.tracking import RegisteredAdapter, promote, register
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder, require_own_code

TABLE = "comparison_table.json"
"""Artifact of the report's first table, which the tracking UI shows."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class StudyResult(ComparisonResult):
    """Result of a study: verdict, table, report and champion."""

    study_id: str
    tracking_uri: str
    """URI of the tracking store, without user and password."""
    champion: RegisteredAdapter | None
    """The registered winner, or None with the reason in `no_champion`."""
    no_champion: str = ""
    trials_run: int = 0
    """Number of trials run by this call; the others had been finished before."""

    def report(self, folder: str | Path | None = None) -> Path:
        """Return the path of the report's page, which the study wrote.

        Args:
            folder: folder to write it to again, made where missing; None: it stays where it is.
        """
        return self.folder / PAGE if folder is None else ComparisonResult.report(self, folder)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values: the comparison, where it is recorded, and its champion."""
        champion = self.champion
        return {
            **self.comparison.to_dict(),
            "study_id": self.study_id,
            "report": str(self.report().resolve()),
            "tracking_uri": self.tracking_uri,
            "champion": None if champion is None else {"name": champion.name, "version": str(champion.version)},
            "no_champion": self.no_champion,
        }


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
    home, title = comparison_input.home, comparison_input.title
    folder = Path(config.tracking.output) / comparison_input.name
    about = About(title=title, examples=comparison_input.examples, data=comparison_input.data)
    write_report(comparison, comparison_input.records, folder, about)
    render_terminal(comparison, console)
    home.files(folder, "report")
    table = stored_table(comparison)
    home.table(TABLE, table.head, [[cell.text for cell in row] for row in table.rows])
    home.describe(render_markdown(comparison, title))
    home.tags({"verdict": comparison.answer[:5000], "champion": comparison.winner})
    for name, label in (("baseline", comparison.baseline), ("champion", comparison.winner)):
        if label != NO_WINNER and (mean := comparison.method(label).loss.mean) is not None:
            home.metric(f"study/{name}_test_loss", mean)
    home.flush()
    champion, reason = None, ""
    try:
        champion = _register(comparison_input, config, comparison, context_for)
    except AdapterError as error:
        reason = str(error)
    return StudyResult(
        comparison=comparison,
        records=tuple(comparison_input.records),
        about=about,
        folder=folder,
        study_id=comparison_input.name,
        tracking_uri=comparison_input.store.shown_uri,
        champion=champion,
        no_champion=reason,
    )


def compare_input(comparison_input: ComparisonInput, config: StudyConfig, baseline: str | None) -> Comparison:
    """Return the comparison without writing anything; the rungs of a ladder are compared among themselves."""
    rungs, records = comparison_input.ladder, comparison_input.records
    asked = {MethodSpec.parse(text).label for text in comparison_input.settings["methods"]} if rungs else set()
    answer = partial(
        compare,
        base_scores=comparison_input.base_scores,
        margin=config.margin,
        margin_share=config.margin_percent / 100,
        correction=cast(Correction, config.correction),
        facts=comparison_input.facts,
        retained=comparison_input.retained,
    )
    bound = ForgettingBound(
        loss=config.max_forgetting,
        share=None if config.max_forgetting_percent is None else config.max_forgetting_percent / 100,
    )
    extra, base = set(rungs) - asked, comparison_input.baseline(baseline)
    plan = comparison_input.plan_for(base, config)
    comparison = answer([one for one in records if one.method not in extra], baseline=base, bound=bound, plan=plan)
    if rungs:
        seeds = None if plan is None else plan.added[0]  # rungs get no further seeds
        shared = [one for one in records if one.method in rungs and (seeds is None or one.seed in seeds)]
        comparison = with_ladder(comparison, answer(shared, baseline=rungs[0]))
    if (teacher := PlantedTeacher.parse(str(comparison_input.settings.get("data")))) is not None:
        oracle = next(filter(comparison.places.__contains__, teacher.oracles()), "")
        comparison = dataclasses.replace(comparison, headroom=headroom_of(comparison, records, oracle))
    if not comparison_input.mixed:
        return comparison
    note = (
        f"Trials of several kinds were pooled as asked ({'; '.join(comparison_input.mixed)}): pairs are formed "
        "within each kind only, whose seeds are numbered from 0, 10,000, 20,000 ...; without one "
        "frozen base no margin follows by itself."
    )
    return dataclasses.replace(comparison, notes=(*comparison.notes, note))


def _register(
    comparison_input: ComparisonInput,
    config: StudyConfig,
    comparison: Comparison,
    context_for: Callable[[TrialRecord], StudyContext],
) -> RegisteredAdapter:
    """Prove, register and promote the winner's best trial by validation loss.

    Raises:
        AdapterError: there is no one adapter, or its proof failed.
    """
    if comparison_input.mixed:
        raise AdapterError(
            "trials of several data sets, splits or bases were compared, so there is no one adapter to register."
        )
    if comparison.winner == NO_WINNER:
        raise AdapterError(f"{comparison.decision}.")
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
    p_value = corrected = "none (the baseline itself)"
    if winner.difference is not None:
        p_value = f"{winner.difference.tests.sign_flip:.4g}"
        corrected = f"{comparison.deciding_p(winner.difference):.4g}"
    tags = {
        "headline": comparison.headline,
        "decision": comparison.decision,
        "verdict": winner.verdict.text,
        "method": best.method,
        "baseline": comparison.baseline,
        "n_seeds": str(len(winner.seeds)),
        "p_value": p_value,
        "p_value_corrected": corrected,
        "correction": comparison.correction,
        "study_id": comparison_input.name,
        "decided_by_run": comparison_input.home.run_id,
        "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "reload_max_logit_difference": repr(proof.max_logit_difference),
        "reload_max_loss_difference": repr(proof.max_loss_difference),
        "base_hash": context.base.reference.content_hash,
        **_forgetting_tags(comparison, winner),
    }
    promote(store, adapter, tags, _version_text(comparison_input, config, comparison, best))
    return adapter


def _forgetting_tags(comparison: Comparison, winner: MethodSummary) -> dict[str, str]:
    """Return what the champion forgot of each source, and what it was allowed to; empty without retained data."""
    texts, allowed = [], []
    for source in comparison.retained:
        if (found := winner.forgetting.get(source.name)) is not None:
            interval = interval_clause(found.forgotten.interval, comparison.confidence)
            texts.append(f"{source.name}: {signed(found.forgotten.mean)} {comparison.unit} ({interval})")
        if source.allowed is not None:
            allowed.append(f"{source.name}: {plain(source.allowed)} {comparison.unit}")
    tags = {"forgetting": "; ".join(texts), "max_forgetting": "; ".join(allowed)}
    return {name: text[:5000] for name, text in tags.items() if text}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Differences between the trained and the reloaded adapter."""

    max_logit_difference: float
    """Maximum absolute difference over the probe's logits."""
    max_loss_difference: float
    """Maximum absolute difference of a test example's summed negative log-likelihood, in nats."""
    test_loss: float
    """Test loss of the reloaded adapter, in nats per supervised token."""


def prove(context: StudyContext, record: TrialRecord, model_uri: str) -> Proof:
    """Load an adapter as in serving, and compare logits and test loss with the trial's.

    Args:
        context: base and test split of the study.
        record: record of the trial, read from the tracking store.
        model_uri: URI of the trial's MLflow model.

    Raises:
        AdapterError: the base differs, or outputs differ by more than the precision's tolerance.
    """
    assert record.test is not None
    try:
        require_own_code(model_uri)  # so that the loaded code is the served code
        folder = adapter_folder(model_uri)
        divided = context.runtime.processes.sharded  # such a base may fit no device whole
        trust = context.base.reference.trust_remote_code
        model = None if divided else load_adapter(folder, trust_remote_code=trust)[0]
        trained = load_file(folder / PROBE)["logits"]
    except Exception as error:  # PEFT, transformers and safetensors raise their own types
        if is_bug(error):
            raise
        raise AdapterError(
            f"the adapter of run {record.run_id} cannot be loaded back ({error}). It was not registered."
        ) from error
    if divided:
        base = record.tags.get("quantisation", BaseStorage.FULL)
        again, logits = reloaded_together(context, folder, record.fold, base)
    else:
        again = context.losses(model, context.splits(record.fold).test)
        logits = probe_logits(context, model, record.fold)
    proof = Proof(
        max_logit_difference=float((logits - trained).abs().max()),
        max_loss_difference=float(np.abs(again.nll_E - record.test.nll_E).max()),
        test_loss=again.loss,
    )
    limit = context.runtime.precision.rounding
    scale = float(trained.abs().max())
    if again.example_ids != record.test.example_ids or not (
        proof.max_logit_difference <= limit * scale
        and proof.max_loss_difference <= limit * float(record.test.nll_E.max())
    ):
        raise AdapterError(
            f"the adapter of run {record.run_id} does not reload as it was trained: logits differ "
            f"by up to {proof.max_logit_difference:.3g}, test losses by "
            f"{proof.max_loss_difference:.3g} nats (allowed in {context.runtime.precision}: "
            f"{limit:.3g} relative, on the machine that trained it). It was not registered."
        )
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return proof
