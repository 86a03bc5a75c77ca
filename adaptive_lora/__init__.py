"""Where should LoRA's ranks go? An MLflow-tracked experiment suite that measures it.

Names of `__all__` are the public API; each is imported from its package when it is first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaptive_lora.models.threads import bound_spinning

if TYPE_CHECKING:
    from adaptive_lora.allocation import MethodSpec, RankPlan, make_plan
    from adaptive_lora.config import StudyConfig, load_study, study_from
    from adaptive_lora.errors import AdaptiveLoraError
    from adaptive_lora.methods.base import RankMethod, TunerMethod
    from adaptive_lora.study.plan import plan_method
    from adaptive_lora.study.run import run_study

__version__ = "0.3.0.dev0"

__all__ = [
    "AdaptiveLoraError",
    "MethodSpec",
    "RankMethod",
    "RankPlan",
    "StudyConfig",
    "TunerMethod",
    "__version__",
    "load_study",
    "make_plan",
    "plan_method",
    "run_study",
    "study_from",
]

_PLACES = {
    "allocation": ("MethodSpec", "RankPlan", "make_plan"),
    "config": ("StudyConfig", "load_study", "study_from"),
    "errors": ("AdaptiveLoraError",),
    "methods.base": ("RankMethod", "TunerMethod"),
    "study.plan": ("plan_method",),
    "study.run": ("run_study",),
}

# Where bitsandbytes is installed, PEFT imports it, and it reports a kernel that is never used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

bound_spinning()  # here, since any module may be the first that loads torch


def __getattr__(name: str) -> Any:
    """Return a name of the public API from the package that defines it."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
