"""Where should LoRA's ranks go? An MLflow-tracked experiment suite that measures it.

Names of `__all__` are the public API; each is imported from its package when it is first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaptive_lora.errors import naming_extras
from adaptive_lora.models.threads import bound_spinning

if TYPE_CHECKING:
    from adaptive_lora.allocation import MethodSpec, RankPlan, make_plan
    from adaptive_lora.analysis.runs.compare import compare
    from adaptive_lora.config import StudyConfig, load_study, study_from
    from adaptive_lora.errors import AdaptiveLoraError
    from adaptive_lora.methods.base import RankMethod, TunerMethod
    from adaptive_lora.methods.importance.own_batches import profile
    from adaptive_lora.runner.audit_callback import AuditCallback
    from adaptive_lora.runner.evaluation import evaluate
    from adaptive_lora.runner.loaded import load
    from adaptive_lora.runner.own_model import allocate, audit, lora_config, plan
    from adaptive_lora.runner.plan import plan_method
    from adaptive_lora.runner.push import push
    from adaptive_lora.runner.rank_callback import RankCallback
    from adaptive_lora.runner.run import run_study
    from adaptive_lora.runner.study import ladder, study

__version__ = "0.3.0.dev0"

__all__ = [
    "AdaptiveLoraError",
    "AuditCallback",
    "MethodSpec",
    "RankCallback",
    "RankMethod",
    "RankPlan",
    "StudyConfig",
    "TunerMethod",
    "__version__",
    "allocate",
    "audit",
    "compare",
    "evaluate",
    "ladder",
    "load",
    "load_study",
    "lora_config",
    "make_plan",
    "plan",
    "plan_method",
    "profile",
    "push",
    "run_study",
    "study",
    "study_from",
]

_PLACES = {
    "AdaptiveLoraError": "errors",
    "AuditCallback": "runner.audit_callback",
    "MethodSpec": "allocation",
    "RankCallback": "runner.rank_callback",
    "RankMethod": "methods.base",
    "RankPlan": "allocation",
    "StudyConfig": "config",
    "TunerMethod": "methods.base",
    "allocate": "runner.own_model",
    "audit": "runner.own_model",
    "compare": "analysis.runs.compare",
    "evaluate": "runner.evaluation",
    "ladder": "runner.study",
    "load": "runner.loaded",
    "load_study": "config",
    "lora_config": "runner.own_model",
    "make_plan": "allocation",
    "plan": "runner.own_model",
    "plan_method": "runner.plan",
    "profile": "methods.importance.own_batches",
    "push": "runner.push",
    "run_study": "runner.run",
    "study": "runner.study",
    "study_from": "config",
}
"""Name of the public API -> module that defines it."""

# Where bitsandbytes is installed, PEFT imports it, and it reports a kernel that is never used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

bound_spinning()  # here, since any module may be the first that loads torch


def __getattr__(name: str) -> Any:
    """Return a name of the public API from the package that defines it.

    Raises:
        MissingExtra: it needs an extra that is not installed.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_extras(f"{__name__}.{name}"):
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
