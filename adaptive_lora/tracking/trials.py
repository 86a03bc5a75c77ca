"""A trial's results as artifacts, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mlflow.entities import Run

from adaptive_lora.errors import TrackingError
from adaptive_lora.results import NATS_PER_TOKEN, EvalResult, TrainResult, TrialRecord
from adaptive_lora.tracking.store import Store

RESULT = "trial.json"
PLAN = "rank_plan.json"
HISTORY = "rank_history.json"


def eval_to_dict(result: EvalResult) -> dict[str, Any]:
    """Return per-example scores as JSON-ready values; floats keep every bit."""
    exact = result.exact_match_E
    return {
        "example_ids": list(result.example_ids),
        "nll": result.nll_E.tolist(),
        "tokens": result.tokens_E.tolist(),
        "correct": None if result.correct_E is None else result.correct_E.tolist(),
        "exact_match": None if exact is None else exact.tolist(),
        "further": {name: values.tolist() for name, values in result.further_E.items()},
        "overall": dict(result.overall),
        "unit": result.unit,
    }


def eval_from_dict(values: dict[str, Any]) -> EvalResult:
    """Read what `eval_to_dict` wrote."""
    exact, correct = values["exact_match"], values["correct"]
    return EvalResult(
        example_ids=tuple(values["example_ids"]),
        nll_E=np.array(values["nll"], dtype=np.float64),
        tokens_E=np.array(values["tokens"], dtype=np.int64),
        correct_E=None if correct is None else np.array(correct, dtype=np.int64),
        exact_match_E=None if exact is None else np.array(exact, dtype=np.float64),
        further_E={name: np.array(column) for name, column in values.get("further", {}).items()},
        overall=values.get("overall", {}),
        unit=values.get("unit", NATS_PER_TOKEN),  # these three are not in earlier studies
    )


def result_to_dict(train: TrainResult, test: EvalResult) -> dict[str, Any]:
    """Return a trial's course and scores for the artifact; what is not finite is None."""
    tokens = (0, *train.step_tokens)
    return {
        "losses": [_number_or_none(loss) for loss in train.losses],
        "validation_curve": [[step, _number_or_none(v)] for step, v in train.validation_curve],
        "validation_tokens": [tokens[step] for step, _ in train.validation_curve],
        "validation_loss": train.validation_loss,
        "test": eval_to_dict(test),
    }


def _number_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_trials(store: Store, runs: Iterable[Run]) -> list[TrialRecord]:
    """Return the records of finished and failed trials; killed and running ones are left out.

    Raises:
        TrackingError: an artifact of a finished trial is missing or damaged.
    """
    ended = [run for run in runs if run.info.status in ("FINISHED", "FAILED")]
    with ThreadPoolExecutor(max_workers=8) as workers:  # a server answers several at once
        return list(workers.map(lambda run: _record(store, run), ended))


def _record(store: Store, run: Run) -> TrialRecord:
    tags, metrics = run.data.tags, dict(run.data.metrics)
    identity = {
        "run_id": run.info.run_id,
        "method": tags["method"],
        "seed": int(tags["seed"]),
        "fold": int(tags["fold"]),
        "lr": float(tags["lr"]),
        "status": run.info.status,
        "metrics": metrics,
        "tags": dict(tags),
        "settings": dict(run.data.params),
    }
    if run.info.status == "FAILED":
        reason = tags.get("failure", "ended without a word; see the run's page in the tracking UI")
        return TrialRecord(**identity, reason=reason)
    try:
        result, plan = (store.read_run_json(run, name) for name in (RESULT, PLAN))
        return TrialRecord(
            **identity,
            trainable_parameters=int(plan["trainable_parameters"]),
            validation_loss=float(result["validation_loss"]),
            validation_curve=tuple(
                (int(s), math.nan if v is None else float(v)) for s, v in result["validation_curve"]
            ),
            validation_tokens=tuple(map(int, result.get("validation_tokens", ()))),
            test=eval_from_dict(result["test"]),
            plan=plan,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TrackingError(
            f"run {run.info.run_id} ({tags['method']}, seed {tags['seed']}) is FINISHED but its "
            f"artifacts cannot be read ({type(error).__name__}: {error}); delete the run and "
            "repeat the study command."
        ) from error
