"""Rounds of a study with racing learning rates: legs of trials, a decision, the next legs."""

from __future__ import annotations

from collections.abc import Iterator

from adaptive_lora.analysis.stats import RACE_RULE
from adaptive_lora.redaction import shown
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.race.decide import MethodRace, Race
from adaptive_lora.runner.schedule import Leg
from adaptive_lora.runner.trial import remove_checkpoints
from adaptive_lora.tracking import StudyRun


def race_rounds(context: StudyContext, study: StudyRun, progress: StudyProgress) -> Iterator[list[Leg]]:
    """Yield the legs of a study between two decisions, each method's learning rates in a race.

    Args:
        context: context of the study.
        study: parent run of the study.
        progress: progress display.

    Raises:
        TrackingError: the store does not answer at a decision.
    """
    race = Race(context, study, RACE_RULE)
    done = sum(context.signature(trial) in study.finished_before for trial in context.config.trials())
    told: set[tuple[str, int]] = set()
    dropped: set[str] | None = None
    while True:
        legs, stopped = race.look()
        for method in race.methods:
            _tell(method, told, progress)
        if dropped is None:
            progress.skip(done, len(stopped))
        else:
            progress.drop({trial.label for trial in stopped} - dropped)
        dropped = {trial.label for trial in stopped}
        remove_checkpoints(context, stopped)
        if not legs:
            break
        yield legs
    _record_steps(race, study, progress)


def _tell(method: MethodRace, told: set[tuple[str, int]], progress: StudyProgress) -> None:
    """Print each decision once."""
    for number, rung in enumerate(method.rungs):
        if (method.label, number) in told:
            continue
        told.add((method.label, number))
        texts = [
            f"{lr:g} ({loss:.4f}{f', {rung.failed[lr]} failed' if rung.failed[lr] else ''})"
            for lr, loss in sorted(rung.losses.items())
        ]
        rates = dict(zip(sorted(rung.losses), texts, strict=True))
        kept = ", ".join(text for lr, text in rates.items() if lr in rung.kept)
        out = ", ".join(text for lr, text in rates.items() if lr not in rung.kept)
        progress.note(
            f"race   {shown(method.label)} at step {rung.step} of {rung.steps}: "
            f"{kept} kept{f'; {out} stopped' if out else ''}"
        )


def _record_steps(race: Race, study: StudyRun, progress: StudyProgress) -> None:
    """Log and print the optimiser steps saved by the race."""
    trained, full = race.steps()
    study.metric("race/trained_steps", trained)
    study.metric("race/full_grid_steps", full)
    study.metric("race/share_of_full_grid", trained / full)
    stopped = sum(len(method.stopped) for method in race.methods)
    rates = sum(len(method.left) for method in race.methods) + stopped
    progress.note(
        f"race   {trained:,} of {full:,} optimiser steps of the full grid trained "
        f"({trained / full:.0%}); {stopped} of {rates} learning rates stopped"
    )
