"""The input of a comparison, read from the tracking store alone.

Neither base model nor data are needed: anyone who can read the store can compare the trials of others.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.analysis.comparison import Outcome, SeedPlan
from adaptive_lora.analysis.comparison.trials import choose_rate, tabulate
from adaptive_lora.config import EARLIER_NAMES, StudyConfig, current_settings, digest, ladder_rungs
from adaptive_lora.errors import ConfigError, DataError, TrackingError
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.results import EvalResult, TrialRecord
from adaptive_lora.runner.recorded import (
    DATA,
    EXAMPLES,
    lines_of,
    recorded_base_scores,
    recorded_json,
    recorded_plan,
    study_settings,
    texts_of,
)
from adaptive_lora.tracking import Recorder, Run, Store, StudyRun, find_trials, open_comparison, read_trials
from adaptive_lora.tracking.runs import RETAINED, STUDY_ID, TOKENS, identity_of

SAME = {
    "data digest": "data_digest",
    "token ids": TOKENS,
    "base model": "base_hash",
    "split": ("split_seed", "test_share", "validation_share", "folds", "max_examples"),
    "scaling": ("alpha", "scaling"),
}
"""Property that compared trials must share -> its tag, or names of settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Selection of trials to compare."""

    study_ids: tuple[str, ...] = ()
    """Ids of studies; empty: the latest study, unless there is a query."""
    query: str | None = None
    """Filter in MLflow's syntax over trial runs of all experiments, or None."""
    allow_mixed: bool = False
    """Permission to compare across data sets, splits and bases, with pairs only within each."""
    own_rates: str = ""
    """Words on how each method's learning rate was chosen within each of these; empty: one rate for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonInput:
    """Trials to compare, with their shared settings and facts."""

    name: str
    """Name of the report's folder: study id, or `compare-` and a digest of the selection."""
    title: str
    home: StudyRun | Recorder
    """Run that the report is logged to."""
    records: tuple[TrialRecord, ...]
    settings: Mapping[str, Any]
    """Recorded settings of the (first) study; empty for trials of a query without a study."""
    base_scores: Mapping[int, EvalResult] | None
    """Scores of the base without adapter per fold; None where not recorded or mixed."""
    examples: Mapping[str, str]
    """Example id -> prompt and response, as far as recorded."""
    facts: Mapping[str, str]
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Study id -> lines of its data summary, as far as recorded."""
    mixed: tuple[str, ...] = ()
    """Differences between trials, where `allow_mixed` permits them."""
    ladder: tuple[str, ...] = ()
    """Labels of the uniform ranks that bracket what an allocation could win, the budget's first; empty: no ladder."""
    plan: SeedPlan | None = None
    """Seeds by look, of a study that goes on until it is decided."""
    retained: tuple[str, ...] | None = None
    """Digests of the studies' retained data; None, without a study: all that trials were scored on."""

    @property
    def store(self) -> Store:
        """Store that everything was read from."""
        return self.home.store

    def baseline(self, given: str | None) -> str:
        """Return the label of the baseline: as given, as recorded, or the first method.

        Raises:
            ConfigError: no baseline is given or recorded.
        """
        recorded = given or self.settings.get("baseline")
        if recorded:
            return str(recorded)
        first = _label(self.settings["methods"][0]) if self.settings else None
        if first is None:
            labels = sorted({record.method for record in self.records})
            raise ConfigError(f"required --baseline, one of: {', '.join(labels)}; none was given.")
        return first

    def plan_for(self, baseline: str, config: StudyConfig) -> SeedPlan | None:
        """Return the seeds by look, with the margin of the first look only where that was computed by the same rule."""
        if self.plan is None:
            return None
        same = baseline == self.baseline(None) and config.margin_percent == self.settings.get("margin_percent")
        return self.plan if same else dataclasses.replace(self.plan, margin=None)


def read_comparison_input(store: Store, selection: Selection) -> ComparisonInput:
    """Find the trials of a selection and read them.

    Raises:
        TrackingError: there is no such study or trial, or artifacts are corrupt.
        DataError: no trial finished, or the trials must not be mixed.
    """
    if selection.query is None and len(selection.study_ids) < 2:
        return comparison_input_of(StudyRun.find(store, next(iter(selection.study_ids), None)))
    studies = [StudyRun.find(store, study_id) for study_id in selection.study_ids]
    runs = [run for study in studies for run in _in_grid(study.children(), study_settings(study))]
    if selection.query is not None:
        runs += find_trials(store, selection.query)
    runs.sort(key=lambda run: run.info.start_time, reverse=True)
    known = {study.study_id: study for study in studies}
    for study_id in sorted({run.data.tags[STUDY_ID] for run in runs} - set(known)):
        try:
            known[study_id] = StudyRun.find(store, study_id)
        except TrackingError:
            continue  # trials whose parent was deleted are still trials
    planned = sorted(key for key, study in known.items() if recorded_plan(study) is not None)
    if planned:
        raise DataError(
            f"{', '.join(planned)} added seeds until it was decided, and its p-values hold for that study alone; "
            f"compare it alone: --study-id {planned[0]}."
        )
    records = _newest(store, runs)
    _require_finished(records, "the selection")
    mixed = _differences(records)
    own_rates = [selection.own_rates] if mixed and selection.own_rates else []
    records = _at_own_rates(records) if own_rates else records
    if mixed and not selection.allow_mixed:
        raise DataError(
            f"these trials cannot be compared: {'; '.join(mixed)}. Compare one kind at a time, or "
            "give --allow-mixed, which pairs trials only within each kind."
        )
    key = digest({"runs": sorted(r.run_id for r in records), "mixed": selection.allow_mixed})[:10]
    title = " and ".join(sorted(known)) if studies and selection.query is None else "Query"
    return _assembled(
        records,
        list(known.values()),
        name=f"compare-{key}",
        title=f"Comparison of {title}",
        home=open_comparison(store, key, f"comparison of {title}"[:250]),
        query=selection.query,
        mixed=[*mixed, *own_rates],
    )


def comparison_input_of(study: StudyRun, plan: SeedPlan | None = None) -> ComparisonInput:
    """Read the trials of one study's recorded grid, and those of seeds that its looks added.

    Args:
        study: the study.
        plan: seeds by look, where they are not recorded yet; None: as recorded.

    Raises:
        TrackingError: its settings or a trial's artifacts cannot be read.
        DataError: no trial finished.
    """
    settings, plan = study_settings(study), plan or recorded_plan(study)
    seeds = [*settings["seeds"], *(() if plan is None else chain.from_iterable(plan.added))]
    records = _newest(study.store, _in_grid(study.each_child(), {**settings, "seeds": seeds}))
    _require_finished(records, f"study {study.study_id}")
    title = f"Study {settings.get('study', study.study_id)}"
    found = _assembled(records, [study], name=study.study_id, title=title, home=study)
    return dataclasses.replace(found, plan=plan)


def _assembled(
    records: Sequence[TrialRecord],
    studies: Sequence[StudyRun],
    *,
    name: str,
    title: str,
    home: StudyRun | Recorder,
    query: str | None = None,
    mixed: Sequence[str] = (),
) -> ComparisonInput:
    """Return the input of a comparison, with what its studies recorded for all of their trials."""
    settings = study_settings(studies[0]) if studies else {}
    facts = _facts(home.store, studies, settings)
    if query is not None:
        facts["query"] = query
    scores = None if mixed else next(filter(None, map(recorded_base_scores, studies)), None)
    texts = [recorded_json(study, EXAMPLES, texts_of) or {} for study in studies]
    data = {study.study_id: recorded_json(study, DATA, lines_of) for study in studies}
    return ComparisonInput(
        name=name,
        title=title,
        home=home,
        records=tuple(_renumbered(records) if mixed else _in_order(records, settings)),
        settings=settings,
        base_scores=scores,
        examples={key: text for found in texts for key, text in found.items()},
        facts=facts,
        data={study_id: lines for study_id, lines in data.items() if lines is not None},
        mixed=tuple(mixed),
        ladder=tuple(_rungs(settings)),
        retained=_retained(studies) if studies else None,
    )


def _retained(studies: Sequence[StudyRun]) -> tuple[str, ...]:
    """Return the digests of the retained data that the studies were last run with."""
    tags = (study.recorded().data.tags.get(RETAINED, "") for study in studies)
    return tuple(dict.fromkeys(digest for text in tags for digest in text.split()))


def _spec(text: str) -> MethodSpec | None:
    """Return a recorded method; None if this version lacks it."""
    try:
        return MethodSpec.parse(text)
    except ConfigError:
        return None


def _label(text: str) -> str | None:
    """Return a recorded method's label; None if this version lacks the method."""
    spec = _spec(text)
    return None if spec is None else spec.label


def _rungs(settings: Mapping[str, Any]) -> list[str]:
    """Return the labels of a recorded ladder, that of the budget first."""
    if not settings.get("ladder"):
        return []
    methods, baseline = settings["methods"], settings.get("baseline")
    base = baseline or MethodSpec.parse(methods[0]).label
    return [base, *(rung.label for rung in ladder_rungs(methods, settings["ladder"], baseline))]


def _in_order(records: Sequence[TrialRecord], settings: Mapping[str, Any]) -> list[TrialRecord]:
    """Return the records in the order of the recorded methods, whichever trials an engine ran first."""
    named = [_label(text) for text in settings.get("methods", ())]
    return sorted(records, key=lambda record: named.index(record.method) if record.method in named else len(named))


def _in_grid(runs: Iterable[Run], settings: Mapping[str, Any]) -> Iterator[Run]:
    """Yield the runs of a recorded grid; if this version lacks one of its methods, those of all methods."""
    shared, seeds = set(map(float, settings["lr"])), set(map(int, settings["seeds"]))
    specs = [_spec(text) for text in settings["methods"]]
    rates = dict.fromkeys(_rungs(settings), shared) | {spec.label: set(spec.lr) or shared for spec in specs if spec}
    for run in runs:
        method, lr, seed, _ = identity_of(run)
        if lr in rates.get(method, shared if None in specs else ()) and seed in seeds:
            yield run


def _newest(store: Store, runs: Iterable[Run]) -> list[TrialRecord]:
    """Read one run per trial, oldest first: its last finished one, otherwise its last failed one.

    Args:
        store: tracking store.
        runs: runs, newest first; they are not kept.
    """
    finished: set[tuple[object, ...]] = set()

    def wanted() -> Iterator[Run]:
        for run in runs:
            key = (run.data.tags[STUDY_ID], *identity_of(run))
            if key not in finished:
                yield run
            if run.info.status == "FINISHED":
                finished.add(key)

    chosen: dict[tuple[object, ...], TrialRecord] = {}
    for record in reversed(read_trials(store, wanted())):
        key = (record.tags[STUDY_ID], record.method, record.lr, record.seed, record.fold)
        if key not in chosen or chosen[key].status != "FINISHED":
            chosen[key] = record
    return list(chosen.values())


def _require_finished(records: Sequence[TrialRecord], whose: str) -> None:
    if not any(record.status == "FINISHED" for record in records):
        reasons = sorted({record.reason for record in records})
        raise DataError(
            f"{whose} has no finished trial to compare"
            + (f"; all failed: {'; '.join(reasons)}" if reasons else "; run `adaptive-lora study`.")
        )


def _kind(record: TrialRecord, what: str) -> str:
    names, given = SAME[what], record.settings
    if isinstance(names, str):
        return record.tags.get(names, "not recorded")
    recorded = {name: given[f"cfg.{name}"] for name in (*names, *EARLIER_NAMES) if f"cfg.{name}" in given}
    settings = current_settings(recorded)[0]
    return ", ".join(f"{name} {settings.get(name, 'not recorded')}" for name in names)


_NAMED = 2
"""Number of the values that a message names, where more than one other is left."""


def _differences(records: Sequence[TrialRecord]) -> list[str]:
    """Return a sentence for every property that trials must share and do not."""
    found = []
    for what in SAME:
        sides: dict[str, set[str]] = defaultdict(set)
        for record in records:
            if SAME[what] == TOKENS and TOKENS not in record.tags:
                continue  # version 0.1 did not record them
            sides[_kind(record, what)].add(record.tags.get(STUDY_ID, "no study"))
        if len(sides) > 1:
            listed = [f"{value} ({', '.join(sorted(who))})" for value, who in sides.items()]
            more = f" and {len(listed) - _NAMED} others" if len(listed) > _NAMED + 1 else ""
            found.append(f"{what} differs: {' against '.join(listed[:_NAMED] if more else listed)}{more}")
    return found


def _at_own_rates(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials at the rate that each method chose within each data set, split and base, as one arm.

    The rate of such an arm is not known: it is not one number.
    """
    groups: dict[tuple[object, ...], list[TrialRecord]] = defaultdict(list)
    for record in records:
        groups[*(_kind(record, what) for what in SAME), record.method].append(record)
    kept: list[TrialRecord] = []
    for group in groups.values():
        curve = choose_rate(tabulate(group, group[0].method), group[0].method, Outcome())
        lr = next((rate.lr for rate in curve if rate.chosen), group[0].lr)
        kept += [dataclasses.replace(record, lr=None) for record in group if record.lr == lr]
    return kept


_APART = 10_000


def _renumbered(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Renumber seeds so that trials are paired only within one data set, split and base.

    Seeds of the second group start at 10,000, those of the third at 20,000.
    """
    kinds = [tuple(_kind(record, what) for what in SAME) for record in records]
    order = list(dict.fromkeys(kinds))
    return [
        dataclasses.replace(record, seed=record.seed + _APART * order.index(kind))
        for record, kind in zip(records, kinds, strict=True)
    ]


def _facts(store: Store, studies: Sequence[StudyRun], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded facts needed to reproduce the studies."""
    facts = {"study id": ", ".join(study.study_id for study in studies), "tracking store": store.shown_uri}
    prefix = "provenance."
    for study in studies:
        own = study.recorded().data.tags
        texts = {"base model": f"{own.get('base')} ({own.get('base_hash', '?')[:16]})"}
        texts["data"] = f"{own.get('data')} ({own.get('data_digest', '?')})"
        if "precision" in own:
            texts["precision"] = own["precision"]
        if own.get("trust_remote_code") == "true":
            texts["code of the base"] = "run (--trust-remote-code true)"
        texts |= {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
        for name, text in texts.items():
            before = facts.get(name)
            if before is None:
                facts[name] = text
            elif text not in before:
                facts[name] = f"{before}; {text}"
    if studies:
        facts["scaling"] = f"{settings.get('scaling', 'constant')}, alpha {settings.get('alpha', 'not recorded')}"
        facts["settings"] = json.dumps(settings)
    return {name: hide_credentials(text) for name, text in facts.items()}
