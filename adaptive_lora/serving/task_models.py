"""Loading of a task's base, by the same code in training and serving, and of an adapter on it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .audio import set_language
from .base import BASE_VARIABLE, TRUST_VARIABLE, BaseMismatch, base_folder, content_hashes
from .gguf_file import as_transformers_reads, require_gguf
from .other_types import register
from .quantised import dequantised, quantised_settings, saved_quantisation, saved_settings, settle
from .safety import (
    CONFIG,
    FAMILY,
    RECORD,
    UnsafeFiles,
    read_json,
    read_record,
    require_adapter,
    require_base,
    require_loaded,
)
from .tasks import TASKS
from .tokens import set_for_decoder, set_padding

if TYPE_CHECKING:
    import torch

CAUSAL: Mapping[str, Any] = MappingProxyType({"name": "causal"})
"""Record of the task of adapters without a recorded one."""


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Differences in weights between a checkpoint and the model loaded from it."""

    missing: tuple[str, ...]
    """Names of the model's weights missing in the checkpoint; their values are random."""
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> shapes in checkpoint and model, where they differ; the values are random too."""
    unread: tuple[str, ...]
    """Names of the checkpoint's weights that the model lacks."""

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Names of all weights of the model without values from the checkpoint."""
        return tuple(sorted({*self.missing, *self.sizes}))


def load_model(
    folder: Path,
    dtype: torch.dtype,
    task: Mapping[str, Any],
    quantisation: Mapping[str, Any] | None = None,
    *,
    dequantise: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Return the frozen model of a task in evaluation mode, on the CPU.

    A quantised model is where transformers puts it: on the GPU if there is one. Modules that the task
    trains in addition to adapters (`head`) are float32, as adapters are.

    Args:
        folder: folder of the base.
        dtype: type of its weights.
        task: record of the task: `name`, and further settings of that task.
        quantisation: record of the quantisation, or None.
        dequantise: whether a quantised model gets plain layers with the dequantised weights, so that it can be
            saved as an ordinary model folder.
        trust_remote_code: whether to run the base's own Python code.

    Raises:
        ImportError: the base is quantised and bitsandbytes is missing.
    """
    model, _ = load_and_compare(folder, dtype, task, quantisation, trust_remote_code=trust_remote_code)
    for name in task.get("head", ()):
        model.get_submodule(name).float()
    if dequantise and quantisation is not None:
        kind = TASKS[task["name"]].model_class
        model = dequantised(model, without_weights(kind, model.config, trust_remote_code=trust_remote_code), dtype)
    return model


def load_and_compare(
    folder: Path,
    dtype: torch.dtype,
    task: Mapping[str, Any],
    quantisation: Mapping[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Differences]:
    """Return the model, and the differences of its weights from its checkpoint.

    The classifier on a base trained for another objective starts without weights.
    """
    from transformers import GgufConfig

    kind = TASKS[task["name"]].model_class
    options = _head_options(task)
    if folder.is_file() or (quantisation is None and saved_quantisation(folder) is None):
        bones = None
    else:
        options, bones = _quantised_options(
            folder, dtype, kind, options, quantisation, trust_remote_code=trust_remote_code
        )
    if folder.is_file():  # full weights, even if a kernel supports the packed ones
        options["quantization_config"] = GgufConfig(dequantize=True)
    with _quiet(), as_transformers_reads(folder) as (where, further):
        model, found = kind.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported in `Differences`
            **options,
            **further,
        )
    if folder.is_file():
        model.name_or_path = str(folder)
    settle(model)
    if bones is not None and quantisation is None:
        model = dequantised(model, bones, dtype)
    if task.get("pad_token_id") is not None:
        set_padding(model, task["pad_token_id"])
    if "labels" in task:
        _sort_classes(model, folder, task["labels"])
    model.requires_grad_(False)
    return model.eval(), Differences(
        missing=tuple(sorted(found["missing_keys"])),
        sizes={name: (tuple(a), tuple(b)) for name, a, b in sorted(found["mismatched_keys"])},
        unread=tuple(sorted(found["unexpected_keys"])),
    )


def _head_options(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a task's head."""
    if "labels" in task:
        return {
            "num_labels": len(task["labels"]),
            "id2label": dict(enumerate(task["labels"])),
            "label2id": {label: index for index, label in enumerate(task["labels"])},
            "problem_type": "single_label_classification",
        }
    if task["name"] == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    return {}


def saved_labels(folder: Path) -> list[str] | None:
    """Return the class names of the head in a model folder, in order; None if it has none."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = {int(index): str(label) for index, label in settings["id2label"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return [named[index] for index in sorted(named)]


def _sort_classes(model: Any, folder: Path, labels: Sequence[str]) -> None:
    """Sort the outputs of a checkpoint's own head by the task's classes."""
    import torch

    saved = saved_labels(folder)
    if saved is None or saved == list(labels) or sorted(saved) != sorted(labels):
        return
    order = [saved.index(label) for label in labels]
    *_, last = (module for module in model.modules() if hasattr(module, "out_features"))
    if last.out_features != len(labels):
        raise ValueError(f"the last layer has {last.out_features} outputs for {len(labels)} classes")
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[order].clone())


def _quantised_options(
    folder: Path,
    dtype: torch.dtype,
    kind: Any,
    head: Mapping[str, Any],
    quantisation: Mapping[str, Any] | None,
    *,
    trust_remote_code: bool,
) -> tuple[dict[str, Any], Any]:
    """Return the loading options of a quantised base, and its architecture without weights.

    Args:
        folder: folder of the base.
        dtype: type of its weights.
        kind: transformers class that loads it.
        head: `_head_options` of the task.
        quantisation: record of the quantisation to load it with, or None.
        trust_remote_code: whether its own code is run.

    Returns:
        Options of `from_pretrained`, and the architecture without weights.

    Raises:
        ValueError: the saved format is not supported, or cannot be quantised again.
    """
    from transformers import AutoConfig, FineGrainedFP8Config

    saved = saved_quantisation(folder)
    if saved is not None and (saved.use == "" or (saved.use != "nf4" and quantisation is not None)):
        again = "" if quantisation is None else f" as {quantisation['scheme']}"
        raise ValueError(f"the weights are saved in {saved.name}, which is not taken{again}")
    whole = {} if saved is None else head
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **whole)
    bones = without_weights(kind, settings, trust_remote_code=trust_remote_code)
    if saved is None:
        assert quantisation is not None
        return {**head, "quantization_config": quantised_settings(quantisation, dtype, bones)}, bones
    if saved.name == "FP8":
        dequantising = FineGrainedFP8Config(dequantize=True)
        return {"config": settings, "quantization_config": dequantising}, bones
    if saved.use == "nf4":
        settings = saved_settings(settings, dtype, bones)
    return {"config": settings}, bones


def without_weights(kind: Any, settings: Any, *, trust_remote_code: bool) -> Any:
    """Return the architecture of a class for a configuration, on the meta device."""
    import torch

    with torch.device("meta"):
        return kind.from_config(settings, trust_remote_code=trust_remote_code)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and the list of missing weights inside the block."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def open_processor(folder: Path, task: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer or processor for a task's texts and images."""
    import transformers

    kind = getattr(transformers, TASKS[task["name"]].processor)
    with _quiet(), as_transformers_reads(folder) as (where, further):
        processor = kind.from_pretrained(where, trust_remote_code=trust_remote_code, **further)
    if task.get("pad_token_id") is not None:
        set_for_decoder(processor, task["pad_token_id"])
    if task.get("language") is not None:
        set_language(processor, task["language"])
    return processor


# An adapter on its base.


def load_adapter(
    folder: Path, *, dequantise: bool = False, trust_remote_code: bool | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Return (adapted model in evaluation mode, processor, record) of an adapter folder.

    Args:
        folder: folder of the adapter.
        dequantise: whether a quantised base is loaded with dequantised weights.
        trust_remote_code: whether to run the base's own Python code; None: by environment variable.

    Raises:
        BaseMismatch: the base's content hash is not the recorded one.
        UnsafeFiles: files could run code, are corrupt, or contradict each other.
    """
    import torch

    record = read_record(folder)
    task = record.setdefault("task", dict(CAUSAL))
    if task["name"] not in TASKS:
        raise UnsafeFiles(f"{folder / RECORD}: required one of the tasks {', '.join(TASKS)}")
    require_adapter(folder)
    if trust_remote_code is None:
        trust_remote_code = os.environ.get(TRUST_VARIABLE) == "1"
    where, trust = _recorded_base(record["base"], trust_remote_code)
    dtype, quantisation = getattr(torch, record["dtype"]), record.get("quantisation")
    model = load_model(where, dtype, task, quantisation, dequantise=dequantise, trust_remote_code=trust)
    model = _adapted(model, folder).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, open_processor(where, task, trust_remote_code=trust), record


def _recorded_base(base: Mapping[str, Any], allowed: bool) -> tuple[Path, bool]:
    """Return the path of a record's base, checked, and whether its code is run."""
    trust = bool(base.get("trust_remote_code"))
    if trust and not allowed:
        raise UnsafeFiles(
            f"base {base['name']} runs its own Python code, which is not done unless you say so: "
            f"--trust-remote-code true, or {TRUST_VARIABLE}=1 where the adapter is served."
        )
    where = base_folder(base["source"], base["name"], base["revision"], code=trust)
    if where.is_file():
        require_gguf(where)
    else:
        require_base(where, weights=True, trust_remote_code=trust)
    found = content_hashes(where, code=trust)
    if base["content_hash"] not in found:
        raise BaseMismatch(
            f"base at {where} has content hash {found[0][:12]}, the adapter was trained on "
            f"{base['content_hash'][:12]}; use the same base or set {BASE_VARIABLE}."
        )
    return where, trust


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    from .custom_tuner import load_custom_tuner

    if (folder / FAMILY).is_file():
        return load_custom_tuner(model, folder)
    register(read_json(folder / CONFIG)["peft_type"])
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; not caused by this package.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # The configuration of a quantised GPT-2's adapter says Linear; PEFT corrects it to Conv1D.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # peft 0.21 looks for patterns among modules, not among target_parameters, where it uses them.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not match", RuntimeWarning)
        # Missing tensors are an error below.
        warnings.filterwarnings("ignore", ".*missing adapter keys", UserWarning)
        model = PeftModel.from_pretrained(model, str(folder))
    require_loaded(model, folder)
    return model
