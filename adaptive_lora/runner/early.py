"""Checks of files and addresses that come before torch, transformers or mlflow are loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from adaptive_lora.config import DataConfig, RetainedSource, StudyConfig
from adaptive_lora.config.base_file import base_file, check_base
from adaptive_lora.config.launched import process_index, require_launch
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.config.ray_place import require_ray_cluster
from adaptive_lora.config.retained import require_retained
from adaptive_lora.config.storage import require_checkpoint_storage
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.errors import ConfigError, require_extra

_DECODERS = ("ForCausalLM", "LMHeadModel")
"""Class name endings of decoder models."""


def require_inputs(config: StudyConfig, *, trained: bool = True) -> None:
    """Check base file, data file, columns and tracking store before anything heavy is loaded.

    Args:
        config: settings of the study.
        trained: whether its methods are trained, so that they must fit the format of the saved base.

    Raises:
        AdaptiveLoraError: the first problem found.
    """
    require_launch(config)
    if trained:
        require_decidable(config)
        require_checkpoint_storage(config.tracking)
    if config.engine == "ray":
        require_extra("ray", "--engine ray")
        require_ray_cluster(config.worker.ray_address or os.environ.get("RAY_ADDRESS", ""))
    kinds = [spec.base for spec in config.specs]
    file = check_base(config.model, kinds) if trained else base_file(config.model)
    require_data(config, config.data, is_gguf=file is not None)
    require_retained(config)
    for source in config.evaluation.retain_data:
        require_data(config, RetainedSource.parse(source).settings(config.data), is_gguf=file is not None)
    own = {config.data.data, "own", "embedded"}
    for task in {task for spec in config.specs for task in spec.profiled_on} - own:
        require_data(config, dataclasses.replace(config.data, data=task))
    if process_index() == 0:  # which alone records
        require_reachable(config.tracking)


def require_decidable(config: StudyConfig) -> None:
    """Refuse a study that goes on until it is decided where no number of its seeds can show a difference.

    Raises:
        ConfigError: sign flips of at most `max_seeds` seeds cannot reach a corrected p of 0.05.
    """
    if config.until != "decided":
        return
    from adaptive_lora.analysis.comparison import first_looks
    from adaptive_lora.analysis.stats import fewest_seeds

    comparisons = len(config.methods) - 1
    if first_looks(config.seeds_at_looks(), comparisons)[0] is None:
        required = fewest_seeds(0.05, comparisons=comparisons, correction="holm")
        raise ConfigError(
            f"until: sign flips of {config.max_seeds} seeds cannot show a difference in any of {comparisons} "
            f"comparison{'s' if comparisons > 1 else ''} at 5 %, whatever is found; required max_seeds of at least "
            f"{required}{', or fewer methods' if comparisons > 1 else ''}."
        )


def require_data(config: StudyConfig, data: DataConfig, *, is_gguf: bool = False, is_known: bool = True) -> None:
    """Read the rows of a study's data; they are cached until the study uses them.

    Args:
        config: settings of the study.
        data: settings of the data.
        is_gguf: whether the base is a GGUF file.
        is_known: whether the settings name the base; False where an adapter does.

    Raises:
        DataError: the data cannot be read or lack a required column.
    """
    from adaptive_lora.data.reading import read_ahead, separate_test
    from adaptive_lora.data.sources import LABELS, require_columns

    decoder = is_known and (is_gguf or _is_decoder(config.model.model))
    prompts = data.task == "causal" or (data.task == "auto" and decoder)
    for source in (data, separate_test(data)):
        if source is not None and source.data != "embedded" and PlantedTeacher.parse(source.data) is None:
            table = read_ahead(source)
            labelled = not set(LABELS).isdisjoint(table.columns)
            require_columns(source, table, prompts=prompts and not labelled)


def _is_decoder(model: str) -> bool:
    """Return whether a base is a decoder model by its own configuration."""
    if model == "embedded":
        return True
    try:
        found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return all(name.endswith(_DECODERS) for name in found["architectures"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
