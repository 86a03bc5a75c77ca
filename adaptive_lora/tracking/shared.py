"""Values that many trials have alike, kept once while they are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_lora.allocation.tuner_plan import read_plan
from adaptive_lora.results import EvalResult

_EARLIER = {"scale_policy": "constant_alpha_over_r", "left_out": (), "certificate": None}
"""Field missing in plans from before scaling policies -> its value at that time."""


class Shared:
    """Texts, plans, and ids and tokens of test examples: 10,000 trials with their own would not fit in memory."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def texts(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return a mapping with shared names and texts."""
        same = self._kept.setdefault
        return {same(key, key): same(value, value) for key, value in values.items()}

    def plan(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a recorded plan, checked and completed."""
        key = ("plan", json.dumps(values))
        if key not in self._kept:
            self._kept[key] = read_plan({**_EARLIER, **values}).to_dict()
        plan: Mapping[str, Any] = self._kept[key]
        return plan

    def scores(self, result: EvalResult) -> EvalResult:
        """Return scores with shared ids and numbers of tokens."""
        ids, tokens_E = self._kept.setdefault(result.example_ids, (result.example_ids, result.tokens_E))
        if not np.array_equal(tokens_E, result.tokens_E):
            tokens_E = result.tokens_E
        return dataclasses.replace(result, example_ids=ids, tokens_E=tokens_E)
