"""The configuration of a study: settings, the grid of trials, and the reader of study files.

A study file is flat YAML whose keys are the command line's options.
"""

from adaptive_lora.config.parsing import EARLIER_NAMES, current_label, current_settings, load_study, study_from
from adaptive_lora.config.retained import RetainedSource
from adaptive_lora.config.sections import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ProfileConfig,
    TrackingConfig,
    TrainConfig,
    WorkersConfig,
)
from adaptive_lora.config.study import StudyConfig, TrialSpec, digest, ladder_rungs, option_fields
from adaptive_lora.config.types import MemorySize, shown

__all__ = [
    "EARLIER_NAMES",
    "DataConfig",
    "EvaluationConfig",
    "MemorySize",
    "ModelConfig",
    "ProfileConfig",
    "RetainedSource",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrialSpec",
    "WorkersConfig",
    "current_label",
    "current_settings",
    "digest",
    "ladder_rungs",
    "load_study",
    "option_fields",
    "shown",
    "study_from",
]
