"""How often does a race choose the learning rate that the full grid chooses, and at which cost?

Replays the race on a stored study of which every trial was trained to its end, for every method and
over random subsets of its seeds and rates, under several rules. Choose the study's `validations` as
a multiple of 3, so that passes stand at one and two thirds:

    python benchmarks/race_replay.py --tracking-uri sqlite:///mlflow.db --study-id study-0a1b2c3d4e

`same`: share of replays that chose the full grid's rate; `loss`: mean final validation loss of the
rate that was chosen above that of the full grid's, in the loss's unit; `steps`: share of the full
grid's optimiser steps. A subset of n seeds stands for a study of n seeds.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_lora.analysis.stats import RACE_RULE, RaceRule, nearest_passes, standing
from adaptive_lora.config import TrackingConfig
from adaptive_lora.runner.race import loss_at
from adaptive_lora.tracking import Store, StudyRun, connect
from adaptive_lora.tracking.runs import identity_of, is_raced

Losses = Mapping[float, Mapping[int, float]]
"""Learning rate -> seed -> validation loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What was measured of one method."""

    label: str
    rungs: tuple[Losses, ...]
    shares: tuple[float, ...]
    """Of a training, for each rung."""
    final: Losses

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that were trained at every rate."""
        return tuple(sorted(set.intersection(*(set(own) for own in self.final.values()))))


def read_grids(store: Store, study_id: str | None) -> list[Grid]:
    """Read every method's curves; folds are averaged within a seed."""
    study = StudyRun.find(store, study_id)
    curves: dict[str, dict[tuple[float, int], list[dict[int, float]]]] = {}
    finals: dict[str, dict[tuple[float, int], list[float]]] = {}
    for run in study.children():
        if is_raced(run):
            raise SystemExit(
                f"study {study.study_id} was raced: what its stopped trials would have reached is "
                "not known. Run the same command without --race first; it trains them."
            )
        if run.info.status not in ("FINISHED", "FAILED"):
            continue
        label, lr, seed, _ = identity_of(run)
        history = store.client.get_metric_history(run.info.run_id, "validation/loss")
        own = curves.setdefault(label, {}).setdefault((lr, seed), [])
        own.append({point.step: point.value for point in history})
        final = run.data.metrics.get("validation/final_loss", np.inf)
        finals.setdefault(label, {}).setdefault((lr, seed), []).append(float(final))
    return [_grid(label, curves[label], finals[label]) for label in sorted(curves)]


def _grid(
    label: str,
    curves: Mapping[tuple[float, int], Sequence[Mapping[int, float]]],
    finals: Mapping[tuple[float, int], Sequence[float]],
) -> Grid:
    passes = sorted({step for folds in curves.values() for curve in folds for step in curve})
    steps = nearest_passes(tuple(passes), passes[-1])
    rungs = []
    for step in steps:
        at: dict[float, dict[int, float]] = {}
        for (lr, seed), folds in curves.items():
            losses = [loss_at(curve, step, since=None) for curve in folds]
            at.setdefault(lr, {})[seed] = float(np.mean(losses))
        rungs.append(at)
    final: dict[float, dict[int, float]] = {}
    for (lr, seed), losses in finals.items():
        final.setdefault(lr, {})[seed] = float(np.mean(losses))
    shares = tuple(step / passes[-1] for step in steps)
    return Grid(label=label, rungs=tuple(rungs), shares=shares, final=final)


def replay(grid: Grid, seeds: Sequence[int], rates: Sequence[float], rule: RaceRule) -> tuple[float, float]:
    """Return the rate that a race chooses, and its share of the full grid's steps."""
    racing = rule.racing(tuple(seeds))
    left = tuple(rates)
    taken, before = 0.0, 0.0
    for number, (rung, share) in enumerate(zip(grid.rungs, grid.shares, strict=True)):
        if len(left) == 1:
            break
        taken += len(racing) * len(left) * (share - before)
        before = share
        left = rule.survivors({lr: {s: rung[lr][s] for s in racing} for lr in left}, number)
    taken += len(racing) * len(left) * (1 - before)
    taken += (len(seeds) - len(racing)) * len(left)
    return choice(grid, seeds, left), taken / (len(seeds) * len(rates))


def choice(grid: Grid, seeds: Sequence[int], rates: Sequence[float]) -> float:
    """Return the rate that the final validation losses choose among these."""
    losses = {lr: {seed: grid.final[lr][seed] for seed in seeds} for lr in rates}
    return min(rates, key=lambda lr: standing(losses, lr))


def cases(grid: Grid, seeds: int, rates: int, most: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return (seeds, rates) of all smaller grids of a size, or so many random ones of more."""
    every = itertools.product(
        itertools.combinations(grid.seeds, seeds), itertools.combinations(sorted(grid.final), rates)
    )
    listed = list(every)
    return listed if len(listed) <= most else random.Random(0).sample(listed, most)


def rules() -> Iterator[RaceRule]:
    """Yield the rules to try, the one of `--race` first."""
    yield RACE_RULE
    shares = ((0.5, 0.5), (0.5, 1.0), (0.67, 0.67), (1.0, 1.0))
    for seeds, kept, level in itertools.product((None, 2, 3, 4, 5), shares, (0.0, 0.001, 0.01, 0.05)):
        rule = RaceRule(seeds=seeds, kept=kept, level=level)
        if rule != RACE_RULE:
            yield rule


def row(grids: Sequence[Grid], rule: RaceRule, seeds: int, rates: int, most: int) -> tuple[float, float, float]:
    """Return same, loss and steps of a rule over methods and smaller grids."""
    same, loss, steps = [], [], []
    for grid in grids:
        for some, few in cases(grid, seeds, rates, most):
            chosen, share = replay(grid, some, few, rule)
            best = choice(grid, some, few)
            final = {lr: np.mean([grid.final[lr][s] for s in some]) for lr in (chosen, best)}
            same.append(chosen == best)
            loss.append(final[chosen] - final[best])
            steps.append(share)
    return float(np.mean(same)), float(np.mean(loss)), float(np.mean(steps))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--study-id", help="none: the latest study")
    parser.add_argument("--seeds", type=int, nargs="*", help="seeds of a replay; none: 3 to all")
    parser.add_argument("--rates", type=int, nargs="*", help="rates of a replay; none: all")
    parser.add_argument("--cases", type=int, default=200, help="most replays of one size a method")
    parser.add_argument("--all-rules", action="store_true", help="every rule, not only --race's")
    arguments = parser.parse_args()
    store = connect(TrackingConfig(tracking_uri=arguments.tracking_uri), must_exist=True)
    grids = read_grids(store, arguments.study_id)
    store.close()
    for grid in grids:
        whole = {lr: np.mean([own[s] for s in grid.seeds]) for lr, own in grid.final.items()}
        listed = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in sorted(whole.items()))
        where = ", ".join(f"{share:.3f}" for share in grid.shares)
        print(f"{grid.label}: {len(grid.seeds)} seeds, rungs at {where}; final loss {listed}")
    fewest = min(len(grid.seeds) for grid in grids)
    seeds = arguments.seeds or list(range(min(3, fewest), fewest + 1))
    rates = arguments.rates or [min(len(grid.final) for grid in grids)]
    print("\nseeds rates  method                      same    loss   steps  rule")
    for rule in rules() if arguments.all_rules else [RACE_RULE]:
        for size, few in itertools.product(seeds, rates):
            one = [] if arguments.all_rules else [[grid] for grid in grids]
            for group in (*one, grids):
                same, loss, steps = row(group, rule, size, few, arguments.cases)
                name = group[0].label if len(group) == 1 else "all"
                print(f"{size:>5} {few:>5}  {name:<25} {same:>6.1%} {loss:>7.4f} {steps:>7.1%}  {rule.text}")


if __name__ == "__main__":
    main()
