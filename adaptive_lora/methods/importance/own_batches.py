"""Importance measured in any script: on a model, batches and a loss of the user's own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any, overload

import torch
from accelerate.utils import has_offloaded_params, send_to_device
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from adaptive_lora.allocation.request import METRICS
from adaptive_lora.data.batches import IGNORED, Batch
from adaptive_lora.errors import AllocationError, ModelError, unknown_name
from adaptive_lora.methods.importance.contract import ProfileTask
from adaptive_lora.methods.importance.profile import ImportanceProfile, profile_importances
from adaptive_lora.models.device import OwnRuntime
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.losses import causal_loss
from adaptive_lora.models.sites import survey_sites

OwnLoss = Callable[[Any, Any], torch.Tensor]
"""Function from a model and a batch of the user's loader to the batch's mean loss: a scalar with gradient."""

_OF_WEIGHTS = frozenset({"heavy_tail", "stable_rank", "condition_number"})
"""Metrics of weights alone, for which no batch is read."""
_TEXT = {"input_ids", "attention_mask"}
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Class that wraps a model -> its attribute that holds the model."""
_PACKED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of weights that are not the weights themselves."""
_READ_BY_PEFT = ("Params4bit", "Int8Params")
"""Classes of packed weights that are dequantised where a metric needs them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _OwnBatch(Batch):
    """A batch of the user's loader as the loader gave it."""

    given: Any
    number: int
    """Place in the loader, from 0."""

    def to(self, device: torch.device) -> _OwnBatch:
        """Return the batch on a device."""
        return _as_given(send_to_device(self.given, device), self.number)


@overload
def profile(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    metric: str = "whitened_gradient",
    loss: OwnLoss | None = None,
    batches: int = 16,
    seed: int = 0,
    experts: bool = False,
) -> ImportanceProfile: ...
@overload
def profile(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    metric: list[str] | tuple[str, ...],
    loss: OwnLoss | None = None,
    batches: int = 16,
    seed: int = 0,
    experts: bool = False,
) -> dict[str, ImportanceProfile]: ...
def profile(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    metric: str | list[str] | tuple[str, ...] = "whitened_gradient",
    loss: OwnLoss | None = None,
    batches: int = 16,
    seed: int = 0,
    experts: bool = False,
) -> ImportanceProfile | dict[str, ImportanceProfile]:
    """Measure how much each adapter site of a model matters for a loss on data.

    The model is not changed: no weight gets a gradient, and modes are restored. It may be on a GPU, or spread over
    several devices by `device_map`. Where a causal language model is given token ids, attention mask and labels alone,
    the result is that of `adaptive-lora profile` on the same batches; other batches are never divided, and every
    second one makes the half of the data by which signal is told from noise.

    Args:
        model: model without adapters, with its weights.
        dataloader: batches of training data. Without `loss` each is a mapping of the model's arguments with `labels`.
        metric: a key of `METRICS`, or several in a list, of which those of gradients share one pass; `ablation` and
            `output_energy` train adapters first, which only a study does.
        loss: function from model and batch to the batch's mean loss; None: the model's own.
        batches: maximum number of batches to read, 2 or more.
        seed: number recorded in the profile.
        experts: whether the routed experts of a mixture of experts are measured too, for methods with `experts=true`.

    Returns:
        Scores by full module name, and spectra where the metric has them; of a list of metrics, a profile by name.

    Raises:
        AllocationError: unknown metric, fewer than two batches, or scores without information.
        ModelError: the model has no adaptable site, has adapters already, is sharded, or does not take the batches, or
            a loss is no finite scalar.
    """
    metrics = tuple(metric) if isinstance(metric, list | tuple) else (metric,)
    if not metrics or len(set(metrics)) < len(metrics):
        raise AllocationError(f"metric: required at least one, each once; got {metric!r:.80}.")
    for name in metrics:
        if name not in METRICS:
            raise AllocationError(unknown_name("metric", name, METRICS))
    if not isinstance(seed, Integral) or seed < 0:
        raise AllocationError(f"seed must be a whole number of at least 0; got {seed!r}.")
    require_base(model)
    _require_readable(model)
    task = ProfileTask(
        model=model,
        sites=survey_sites(model).sites_of(experts),
        runtime=OwnRuntime(_device(model)),
        **_calibration(model, dataloader, metrics, loss, batches),
    )
    with model_errors(f"{type(model).__name__} cannot be profiled on these batches", model), _as_loaded(model):
        found = profile_importances(task, metrics=metrics, seed=seed)
    return found if isinstance(metric, list | tuple) else found[metric]


def _calibration(
    model: Any, dataloader: Iterable[Any] | None, metrics: Sequence[str], loss: OwnLoss | None, batches: int
) -> dict[str, Any]:
    """Return the batches of a profile and their summed loss; none for metrics of weights alone."""
    if _OF_WEIGHTS.issuperset(metrics):
        if dataloader is not None or loss is not None:
            names = f"{' and '.join(metrics)} {'looks' if len(metrics) == 1 else 'look'}"
            logging.getLogger(__name__).warning("%s at weights alone: dataloader and loss are not used.", names)
        return {"batches": (), "loss": causal_loss}
    if loss is not None and not callable(loss):
        raise AllocationError(f"loss must be a function from model and batch; got {loss!r:.80}.")
    found = _read(dataloader, batches)
    if loss is None:
        _require_labelled(model, found)
        if _is_plain_text(model, found):
            return {"batches": [_text_batch(batch) for batch in found], "loss": causal_loss}
    if "gradient_variance" in metrics:
        raise AllocationError(
            "gradient_variance compares single examples, which batches of an unknown loss cannot be divided into; "
            "required a causal language model with input_ids, attention_mask and labels alone. Use another metric."
        )
    return {"batches": [_as_given(batch, number) for number, batch in enumerate(found)], "loss": _summed(loss)}


def require_base(model: Any) -> None:
    """Check that an object is a model without adapters.

    Raises:
        ModelError: it is no model, or has adapters.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        given = f"the text {model!r:.80}" if isinstance(model, str) else f"a {kind}"
        raise ModelError(
            "required a loaded model (a torch.nn.Module, such as AutoModelForCausalLM.from_pretrained returns); got "
            f"{given}."
        )
    if (inner := _WRAPPERS.get(kind)) is not None:
        raise ModelError(f"{kind} wraps a model under other names; required the model inside, its attribute {inner}.")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(f"{kind} has adapters already; required the base before get_peft_model (or after unload()).")


def _require_readable(model: Any) -> None:
    """Raise ModelError for a model whose weights this process cannot read."""
    kind = type(model).__name__
    for name, parameter, module in _weights(model):
        if hasattr(parameter, "ds_id") or type(parameter).__name__ == "DTensor":
            raise ModelError(
                f"{kind} is sharded ({name} is only in part on this process); required the whole model: profile "
                "before FSDP, DeepSpeed or tensor parallelism takes it, or on one process."
            )
        if parameter.is_inference():
            raise ModelError(
                f"{kind} was made under torch.inference_mode, so that no gradient goes through {name}; required a "
                "model that was loaded outside it."
            )
        if parameter.is_meta and not has_offloaded_params(module):
            raise ModelError(f"{kind} has no weights for {name} (it is on the meta device); required a loaded model.")
        if parameter.dtype in _PACKED and type(parameter).__name__ not in _READ_BY_PEFT:
            raise ModelError(
                f"{kind} stores {name} as {parameter.dtype}, which profiling cannot read; required weights as trained, "
                "or in bitsandbytes' 4 or 8 bit. Load it dequantised."
            )
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"{kind} ran without gradients on this CPU, for which bitsandbytes packed {name} so that no gradient "
                "goes through it; required the model as loaded. Load it again, and profile it first."
            )


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield name, parameter and owner of all parameters."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, parameter, module


@contextmanager
def _as_loaded(model: nn.Module) -> Iterator[None]:
    """Keep libraries from converting a model inside the block.

    bitsandbytes would pack 4-bit weights anew on a CPU, in passes without gradients, and a model after its own
    `compile()` would compile each hook.
    """
    modules = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    for module in modules:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in modules:
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


def _device(model: Any) -> torch.device:
    """Return the device of a model's inputs."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _read(dataloader: Iterable[Any] | None, batches: int) -> list[Any]:
    """Return the first batches of a loader.

    Raises:
        AllocationError: there is no loader, or it has fewer than two batches.
    """
    if not isinstance(batches, int) or batches < 2:
        raise AllocationError(
            f"batches must be a whole number of at least 2, because halves of the data are compared; got {batches!r}."
        )
    if dataloader is None:
        raise AllocationError(
            "required a dataloader: this metric is measured on data. Give one, or a metric of weights."
        )
    if not isinstance(dataloader, Iterable):
        raise AllocationError(f"required a dataloader, an iterable of batches; got {type(dataloader).__name__}.")
    found = list(islice(dataloader, batches))
    if len(found) < 2:
        raise AllocationError(
            f"the dataloader gave {len(found)} {'batch' if found else 'batches'}; required at least 2, because halves "
            "of the data are compared. Use a smaller batch size, or more data; a generator gives its batches once."
        )
    return found


def _is_plain_text(model: Any, batches: Sequence[Any]) -> bool:
    """Return whether batches are token ids, mask and labels of a causal language model, with some label each."""
    from transformers.models.auto import modeling_auto as auto

    return type(model).__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and all(
        isinstance(batch, Mapping)
        and _TEXT <= set(batch) <= {*_TEXT, "labels"}
        and "labels" in batch
        and bool((batch["labels"][:, 1:] != IGNORED).any())
        and batch["labels"].shape == batch["input_ids"].shape
        and _in_vocabulary(batch["labels"], model.config.get_text_config().vocab_size)
        for batch in batches
    )


def _in_vocabulary(labels: torch.Tensor, size: int) -> bool:
    """Return whether labels are token ids; the model's own loss says what is wrong with others."""
    valid = (labels == IGNORED) | ((labels >= 0) & (labels < size))
    return labels.dtype == torch.long and bool(valid.all())


def _text_batch(batch: Mapping[str, torch.Tensor]) -> Batch:
    return Batch.of_text(**{name: batch[name].cpu() for name in (*_TEXT, "labels")})


def _as_given(given: Any, number: int) -> _OwnBatch:
    """Return a batch with what can be told of its examples, mask and number of targets."""
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)} if isinstance(given, Mapping) else {}
    labels = tensors.get("labels")
    if labels is None:
        first = next(iter(tensors.values()), None)
        if first is None and isinstance(given, Sequence):
            first = next((item for item in given if isinstance(item, torch.Tensor)), None)
        labels = torch.zeros(1 if first is None or first.ndim == 0 else len(first))
    masks = {name: tensor for name, tensor in tensors.items() if name.endswith("attention_mask")}
    return _OwnBatch(inputs=masks, labels=labels, whole=True, given=given, number=number)


def _summed(loss: OwnLoss | None) -> Callable[[Any, _OwnBatch], torch.Tensor]:
    """Return the loss summed over a batch's targets, from a mean; None: the model's own loss."""

    def total(model: Any, batch: _OwnBatch) -> torch.Tensor:
        found = model(**batch.given).loss if loss is None else loss(model, batch.given)
        if found is None:
            raise ModelError(f"{type(model).__name__} returns no loss for these batches; give loss=.")
        if not isinstance(found, torch.Tensor) or found.ndim:
            shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)[:80]
            raise ModelError(f"the loss is {shape}; required a scalar tensor, the mean over the batch.")
        if not torch.isfinite(found):
            raise ModelError(
                f"the loss of batch {batch.number} is {found.item()}; required a finite one. Check its labels and "
                "values, and the model's weights and precision."
            )
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ModelError(
                "the loss has no gradient: it was detached or computed under no_grad, or does not depend on the "
                "model's linear layers; required a loss that backward() can start from."
            )
        return found.float() * max(1, batch.supervised_tokens)

    return total


def _require_labelled(model: Any, batches: Sequence[Any]) -> None:
    """Check batches of the model's arguments, for which the model computes its loss itself.

    Raises:
        ModelError: a batch is no mapping of batched tensors that the model takes, or has no label.
    """
    kind, taken = type(model).__name__, _arguments(model)
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ModelError(
                f"the dataloader gives {type(batch).__name__}; required mappings of the model's arguments with "
                "`labels`, or loss=, a function from model and batch."
            )
        if batch.get("labels") is None:
            raise ModelError(
                f"batch {number} has no labels, only {', '.join(map(str, batch))}; required `labels`, or loss=, a "
                "function from model and batch."
            )
        if taken is not None and (odd := sorted(set(map(str, batch)) - taken)):
            raise ModelError(f"{kind} does not take {', '.join(odd)} of the batches; leave that out, or give loss=.")
        labels, ids = batch["labels"], batch.get("input_ids", batch.get("pixel_values", batch["labels"]))
        for name, value in {"labels": labels, "input_ids": ids}.items():
            if not isinstance(value, torch.Tensor):
                raise ModelError(
                    f"{name} of batch {number} is a {type(value).__name__}; required tensors of a batch, such as a "
                    "torch DataLoader with a collate_fn gives."
                )
        mask = batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == ids.ndim == 2 and mask.shape != ids.shape:
            raise ModelError(
                f"attention_mask of batch {number} has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; "
                "required the same."
            )
        if labels.ndim == 0 or (ids.ndim == 1 and not {"input_ids", "pixel_values"}.isdisjoint(batch)):
            raise ModelError(
                f"batch {number} is a single example, of shape {tuple(ids.shape)}; required a batch of them, such as a "
                "torch DataLoader with batch_size gives."
            )
        if not labels.is_floating_point() and not bool((labels != IGNORED).any()):
            raise ModelError(f"all labels of batch {number} are {IGNORED}, so that it has no loss; leave it out.")


def _arguments(model: Any) -> set[str] | None:
    """Return the names of a model's arguments, or None where it takes any."""
    taken = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return set(taken)
    return {*taken, *TransformersKwargs.__optional_keys__} if isinstance(model, PreTrainedModel) else None
