"""Base models: the embedded default, local folders, GGUF files and hub models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora import serving
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import ModelConfig
from adaptive_lora.config.base_file import base_file, require_kinds
from adaptive_lora.errors import ConfigError, ModelError, brief, installed
from adaptive_lora.models.classes import auto_class, require_class, require_one_class, warn_of_code
from adaptive_lora.models.errors import is_bug
from adaptive_lora.models.heads import (
    count_head,
    find_head,
    pad_for_classes,
    require_all_read,
    require_complete,
    require_read,
    warn_of_classes,
)
from adaptive_lora.serving import Differences, SavedQuantisation
from adaptive_lora.serving.gguf_file import as_transformers_reads, read_header, require_gguf
from adaptive_lora.serving.safety import CONFIG, UnsafeFiles, require_base
from adaptive_lora.serving.tokens import position_limit

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseReference:
    """Reference to a base model, with the hash of its content."""

    source: str
    """Kind of source: `embedded`, `folder`, `gguf` or `hub`."""
    name: str
    """Name: `embedded`, the absolute path of the folder or file, or the hub id."""
    revision: str | None
    """Commit on the hub; None elsewhere."""
    content_hash: str
    """SHA-256 over everything in the base that affects results; see `serving.content_hash`."""
    trust_remote_code: bool = False
    """Mark of a base whose own Python code was run, with the user's permission."""
    stored_as: str | None = None
    """Saved format of dequantised weights: tensor types of a GGUF file, or the format of a folder;
    None where weights are used as saved."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `stored_as` only if it is not None."""
        values = asdict(self)
        if self.stored_as is None:
            del values["stored_as"]
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A loaded base with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: BaseReference
    max_positions: int | None
    """Maximum sequence length in tokens, or None where the configuration gives none."""
    task: Mapping[str, Any]
    """Record of the task that it was loaded for, used in serving."""
    head: tuple[str, ...] = ()
    """Names of modules that the task trains in addition to adapters."""
    missing_keys: tuple[str, ...] = ()
    """Names of head weights missing in the checkpoint; they are initialised by each trial's seed."""
    quantisation: Mapping[str, Any] | None = None
    """Record of the quantisation of its weights; None where they are used as saved."""
    earlier_hashes: tuple[str, ...] = ()
    """Content hashes of the same files by earlier versions, where they differ."""

    def is_recorded_as(self, content_hash: str) -> bool:
        """Return whether a recorded hash, by this or an earlier version, is of this base."""
        return content_hash in (self.reference.content_hash, *self.earlier_hashes)

    @property
    def total_parameters(self) -> int:
        """Number of all parameters, with tied ones counted once, as trained by full fine-tuning."""
        return count_parameters(self.model)

    @property
    def head_parameters(self) -> int:
        """Number of parameters that the task trains in addition to adapters."""
        return count_head(self.model, self.head)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, with tied ones counted once and packed ones unpacked."""
    modules: Iterator[Any] = model.modules()
    packed = {id(m.weight): math.prod(m.quant_state.shape) for m in modules if getattr(m, "quant_state", None)}
    return sum(packed.get(id(parameter)) or parameter.numel() for parameter in model.parameters())


def locate(config: ModelConfig, *, weights: bool = True) -> tuple[str, str, Path]:
    """Return (source, name, local folder or GGUF file) of a base; hub models are downloaded.

    Args:
        config: the base.
        weights: whether to download weights; a plan needs config.json alone.

    Raises:
        ModelError: there is no such folder with a config.json, GGUF file or hub model.
    """
    file = base_file(config)
    if config.model == "embedded":
        source, name = "embedded", "embedded"
    elif file is not None:
        source, name = "gguf", str(file)
    elif Path(config.model).is_dir():
        source, name = "folder", str(Path(config.model).resolve())
    else:
        source, name = "hub", config.model
    try:
        folder = serving.base_folder(source, name, config.revision, code=config.trust_remote_code, weights=weights)
    except UnsafeFiles as error:
        raise ModelError(str(error)) from error
    except Exception as error:  # huggingface_hub raises a dozen unrelated types
        raise ModelError(
            f"base model '{config.model}' is neither a local folder nor reachable on the hub "
            f"({type(error).__name__}: {brief(error)}); give a folder with "
            "config.json, tokenizer and weights, or 'embedded'."
        ) from error
    if not folder.is_file() and not (folder / "config.json").is_file():
        other = " It is an adapter; give its base." if (folder / CONFIG).is_file() else ""
        raise ModelError(f"{folder} is no model folder: required config.json; found none.{other}")
    return source, name, folder


def load_base(
    config: ModelConfig,
    dtype: torch.dtype,
    task: Mapping[str, Any] = serving.CAUSAL,
    quantisation: Mapping[str, Any] | None = None,
    *,
    divided: bool = False,
) -> BaseModel:
    """Load a base for training, frozen, on the CPU.

    Args:
        config: the base.
        dtype: type of its weights.
        task: record of the task that it is trained for.
        quantisation: record of the quantisation to load it with, or None.
        divided: whether it will be divided over processes, which needs packed weights in a type of numbers.

    Raises:
        ModelError: weights or tokenizer are missing, or transformers cannot read a file.
        ConfigError: bitsandbytes is missing, or the saved weights have another quantisation.
    """
    source, name, folder = locate(config)
    trust = config.trust_remote_code
    saved = _saved(folder, quantisation, divided)
    quantisation = quantisation and {**quantisation, **({"double": saved.double} if saved else {})}
    require_weights(folder, trust_remote_code=trust)
    settings = read_settings(folder, trust_remote_code=trust)
    require_class(settings, kind := auto_class(settings), task["name"], folder)
    packed = {**quantisation, "storage": dtype} if quantisation and divided else quantisation
    with _refusing(folder, f"{folder} cannot be loaded"):
        model, differences = serving.load_and_compare(folder, dtype, task, packed, trust_remote_code=trust)
        tokenizer = serving.open_processor(folder, task, trust_remote_code=trust)
    if serving.TASKS[task["name"]].needs_end and getattr(tokenizer, "tokenizer", tokenizer).eos_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-text token; one is required.")
    if serving.TASKS[task["name"]].head_over_text and kind is serving.TASKS["causal"].model_class:
        task = {**task, "pad_token_id": pad_for_classes(model, tokenizer, folder)}
    head = _head_of(model, task, differences, folder)
    warn_of_code(folder, trusted=trust)
    content_hash, *earlier = serving.content_hashes(folder, code=trust)
    reference = BaseReference(
        source=source,
        name=name,
        # A snapshot of the hub is in a folder named by its commit.
        revision=folder.name if source == "hub" and folder.parent.name == "snapshots" else None,
        content_hash=content_hash,
        trust_remote_code=trust,
        stored_as=None if saved is None or saved.use == "nf4" else saved.name,
    )
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        reference=reference,
        task={**task, "head": list(head)} if head else dict(task),
        head=head,
        missing_keys=differences.missing_keys if head else (),
        quantisation=quantisation,
        earlier_hashes=tuple(earlier),
        max_positions=position_limit(model.config),
    )


def _saved(folder: Path, quantisation: Mapping[str, Any] | None, divided: bool) -> SavedQuantisation | None:
    """Return the quantisation of the saved weights, checked against the one to load."""
    saved = require_kinds(folder, [BaseStorage.FULL if quantisation is None else quantisation["scheme"]])
    if saved is not None and saved.name.startswith("bitsandbytes"):
        require_quantiser(f"{folder} is saved in {saved.name}, which")
    if divided and saved is not None and saved.use == "nf4":
        raise ConfigError(
            f"{folder} is saved in {saved.name} as bytes, which FSDP2 cannot divide over processes. Give the base in "
            "full precision with base=nf4, or launch without --use_fsdp."
        )
    if folder.is_file():
        return SavedQuantisation(read_header(folder).stored_as, "dequantised")
    return saved


def _head_of(model: PreTrainedModel, task: Mapping[str, Any], found: Differences, folder: Path) -> tuple[str, ...]:
    """Return the names of a task's head modules, in float32; check that no other weights are missing."""
    head = find_head(model, found.missing_keys) if serving.TASKS[task["name"]].head else ()
    require_complete(found, head)
    if folder.is_file():
        require_all_read(model, folder, head)
    else:
        require_read(model, found, head)
    if head and not found.missing_keys:
        warn_of_classes(folder, task.get("labels", ()))
    for part in head:
        model.get_submodule(part).float()
    return head


def require_quantiser(what: str = "base=nf4") -> None:
    """Raise ConfigError if bitsandbytes is needed and not installed."""
    if not installed("bitsandbytes"):
        otherwise = "leave base out" if what == "base=nf4" else "give another base"
        raise ConfigError(
            f"{what} needs bitsandbytes, which is not installed: pip install 'adaptive-lora[qlora]', or {otherwise}."
        )


def require_weights(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ModelError if a model folder has no weights in a safe format."""
    _require_safe(folder, trust_remote_code, weights=True)
    if not folder.is_file() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no weights: required *.safetensors; `plan` works without them, training does not."
        )


def _require_safe(folder: Path, trust_remote_code: bool, *, weights: bool) -> None:
    try:
        if folder.is_file():
            require_gguf(folder)
        else:
            require_base(folder, weights=weights, trust_remote_code=trust_remote_code)
    except (UnsafeFiles, ImportError) as error:
        raise ModelError(str(error)) from error


def read_settings(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model folder's config.json, or the configuration in a GGUF file.

    Raises:
        ModelError: transformers cannot use it, or only with Python code that is not trusted.
    """
    from transformers import AutoConfig

    _require_safe(folder, trust_remote_code, weights=False)
    with _refusing(folder):
        if folder.is_file():
            settings: PretrainedConfig = deepcopy(_gguf_settings(folder, folder.stat().st_mtime_ns))
        else:
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return settings


@contextmanager
def _refusing(folder: Path, what: str = "") -> Iterator[None]:
    """Convert errors in reading a base inside the block: transformers validates little, so it can raise anything.

    Args:
        folder: folder of the base, or a GGUF file.
        what: beginning of the message; by default, that the configuration cannot be used.
    """
    try:
        yield
    except Exception as error:
        if is_bug(error):
            raise
        if "trust_remote_code" in str(error):  # transformers asks for permission to run the base's own code
            raise ModelError(
                f"{folder} runs only with Python code of its own, which is not run unless you say so: "
                "read it, then give --trust-remote-code true."
            ) from error
        what = what or f"{folder if folder.is_file() else folder / 'config.json'} cannot be used"
        raise ModelError(f"{what}: {brief(error)}") from error


@lru_cache(maxsize=4)
def _gguf_settings(file: Path, changed: int) -> PretrainedConfig:
    """Return the configuration of a GGUF file, cached by its modification time, because reading takes seconds."""
    from transformers import AutoConfig

    with as_transformers_reads(file) as (folder, further):
        settings: PretrainedConfig = AutoConfig.from_pretrained(folder, **further)
    return settings


def skeleton(config: ModelConfig, task: str = "auto", kinds: Sequence[str] = ()) -> PreTrainedModel:
    """Return the architecture without weights (on the meta device), for plans and counts.

    Args:
        config: the base.
        task: task to build it for; auto: the class of its checkpoint.
        kinds: option `base` of the methods to plan.

    Raises:
        ModelError: the folder or configuration cannot be used.
        ConfigError: a method's `base` does not fit how the weights are saved.
    """
    _, _, folder = locate(config, weights=False)
    if kinds:
        require_kinds(folder, kinds)
    trust = config.trust_remote_code
    settings = read_settings(folder, trust_remote_code=trust)
    kind = auto_class(settings) if task == "auto" else serving.TASKS[task].model_class
    require_one_class(settings, kind, folder)
    with _refusing(folder):
        model: PreTrainedModel = serving.without_weights(kind, settings, trust_remote_code=trust)
    return model


@contextmanager
def gradient_checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Recompute activations in the backward pass inside the block.

    Non-reentrant, with gradients at the inputs: otherwise some adapters on a frozen base silently get
    no gradient (locuslab/open-unlearning issue 178).
    """
    if not enabled:
        yield
        return
    model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
