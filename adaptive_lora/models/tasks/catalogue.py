"""The tasks by name, and the automatic choice of the task by base and data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from adaptive_lora import serving
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.data.reading import Table, read_ahead
from adaptive_lora.data.rows import not_numeral, scalar_text
from adaptive_lora.data.sources import LABELS
from adaptive_lora.data.tagged import has_tags
from adaptive_lora.errors import ConfigError
from adaptive_lora.models.base import locate, read_settings
from adaptive_lora.models.classes import auto_class
from adaptive_lora.models.tasks.causal import CausalTask
from adaptive_lora.models.tasks.image_text import ImageTextTask
from adaptive_lora.models.tasks.labelled import ClassificationTask, ImageClassificationTask, RegressionTask
from adaptive_lora.models.tasks.planted import PlantedTask
from adaptive_lora.models.tasks.seq2seq import Seq2SeqTask
from adaptive_lora.models.tasks.speech import SpeechTask
from adaptive_lora.models.tasks.tagging import TokenClassificationTask
from adaptive_lora.models.tasks.task import Task
from adaptive_lora.models.tasks.vision_language import VisionLanguageTask

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            CausalTask,
            ClassificationTask,
            RegressionTask,
            TokenClassificationTask,
            Seq2SeqTask,
            ImageClassificationTask,
            ImageTextTask,
            VisionLanguageTask,
            SpeechTask,
        )
    }
)
"""Value of the option `task` -> task."""
_BY_CLASS = {task.saved_as: task.name for task in serving.TASKS.values() if task.saved_as}
"""Model class of a checkpoint -> its task, for any data."""
_FEW = 20
"""Maximum number of distinct integers for which a column is taken to be classes."""


def task_named(config: StudyConfig) -> type[Task]:
    """Return the task of a study.

    Raises:
        ConfigError: the task is `auto`, and base and data do not determine it.
    """
    if PlantedTeacher.parse(config.data.data) is not None:
        if config.data.task not in ("auto", PlantedTask.name):
            raise ConfigError(f"task: a planted teacher writes texts; required --task causal, got {config.data.task}.")
        return PlantedTask
    name = config.data.task if config.data.task != "auto" else found_task(config)
    if name is None:
        raise ConfigError(
            f"task: base {config.model.model} and data {config.data.data} fit several tasks or "
            f"none; required --task, one of {', '.join(TASKS)}."
        )
    return TASKS[name]


def found_task(config: StudyConfig) -> str | None:
    """Return the only task that a base and its data fit, or None."""
    import transformers

    _, _, folder = locate(config.model, weights=False)
    settings = read_settings(folder, trust_remote_code=config.model.trust_remote_code)
    kind = auto_class(settings).__name__
    if kind in _BY_CLASS:
        return _BY_CLASS[kind]
    if type(settings) in transformers.AutoModelForZeroShotImageClassification._model_mapping:
        return "image_text"
    if type(settings) in transformers.AutoModelForSequenceClassification._model_mapping:
        return None if config.data.data == "embedded" else _of_labels(config)
    if type(settings) in transformers.AutoModelForImageClassification._model_mapping:
        return "image_classification"
    return None


def _of_labels(config: StudyConfig) -> str | None:
    """Return whether labels are classes, numbers or tags of words; None where a column fits several or none."""
    table = read_ahead(config.data)  # the task reads the same table next
    if has_tags(config.data, table):
        return "token_classification"
    column = config.data.response_column or next((name for name in LABELS if name in table.columns), None)
    return None if column is None or column not in table.columns else _kind_of(table, column)


def _kind_of(table: Table, column: str) -> str | None:
    """Return the task for a column's values; in CSV and TSV, numbers are text."""
    values = {scalar_text(row.get(column)) for row in table.rows} - {None, ""}
    if column in table.classes or not all(map(_is_number, values)):
        return "classification"
    if any(not float(str(value)).is_integer() for value in values):
        return "regression"
    return "classification" if len(values) <= _FEW else None


def _is_number(text: str | None) -> bool:
    return text is not None and not not_numeral(text) and math.isfinite(float(text))
