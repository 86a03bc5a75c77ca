"""Plans for a model of one's own: the configuration given to stock PEFT, and the check of what it built."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import MethodSpec, Plan, RankPlan, TunerPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import EARLIER_NAMES, StudyConfig, study_from
from adaptive_lora.config.base_file import check_base
from adaptive_lora.config.text_files import Unreadable, read_text
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError, ModelError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from adaptive_lora.methods.importance import ImportanceProfile
    from adaptive_lora.methods.importance.own_batches import OwnLoss
    from adaptive_lora.runner.plan import PlanReport

PLAN_SETTINGS = (
    "model", "revision", "trust_remote_code", "alpha", "scaling", "precision", "batch_size",
    "batching", "max_tokens", "gradient_checkpointing", "max_memory", "task",
)  # fmt: skip
"""Study settings that affect a plan."""
_OF_A_NAME = ("revision", "trust_remote_code", "task")
"""Study settings that say how a model is found and built."""
_LISTS = ("target_names", "roles", "layers", "towers")


def plan(
    model: PreTrainedModel | str | PathLike[str],
    method: str = "uniform",
    *,
    profile: ImportanceProfile | str | PathLike[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> PlanReport:
    """Return the rank of every adapter site of a model under a method; no weights are read or changed.

    Args:
        model: model with or without weights, such as one of transformers; or what `--model` takes: a folder, a GGUF
            file, a name on the hub or `embedded`, of which the configuration alone is read.
        method: name of a method, or `NAME:option=value,...` as on the command line.
        profile: importance from `profile`, or its file, for methods that follow one.
        seed: seed of methods that draw at random.
        **options: options of the method, such as `budget="uniform-8"`, `rank=8` or `placement="attention"`, which
            override those in its text, and settings of `adaptive-lora plan`: `alpha` (32), `scaling` (`standard`,
            `rslora` or `constant`), and for the estimate of memory `batch_size`, `max_tokens`, `precision`,
            `max_memory`.

    Returns:
        The plan with its table, totals and estimated memory; a notebook shows it as a table.

    Raises:
        ConfigError: unknown method or option, or a value out of limits.
        ModelError: the model cannot be used, or has no adaptable site.
        AllocationError: the profile is missing or of another model, or the budget cannot be met.
    """
    if model is None:
        raise ModelError("required a loaded model, or the folder or name of one; got None.")
    if not isinstance(seed, Integral) or seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0; got {seed!r}.")
    config, spec = plan_request(method, options)
    own = None if isinstance(model, str | PathLike) else model
    if own is None:
        config = study_from({"model": str(model)}, base=config)
        check_base(config.model, [spec.base])
    else:
        _require_own(spec, options)
        if spec.options.metric is not None and profile is None:
            raise AllocationError(
                f"{spec.label} follows the importance metric {spec.options.metric}; required profile=, from "
                f"al.profile(model, dataloader, metric={spec.options.metric!r})."
            )
    if spec.options.metric is None and profile is not None:
        logging.getLogger(__name__).warning("%s follows no importance profile: the one given is not used.", spec.label)
    from adaptive_lora.runner.plan import plan_method

    measured = None if profile is None else _measured(profile)
    return plan_method(config, spec, profile=measured, seed=seed, base=own)


def plan_request(method: str, given: Mapping[str, Any]) -> tuple[StudyConfig, MethodSpec]:
    """Return settings and method from options of both; loads no torch.

    Args:
        method: `NAME[:option=value,...]`.
        given: options of the method and `PLAN_SETTINGS`; None: not given.

    Raises:
        ConfigError: unknown method or option, or a value out of limits.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    chosen = {name: settings.pop(name) for name in list(settings) if name not in (*PLAN_SETTINGS, *EARLIER_NAMES)}
    for several in _LISTS:
        if isinstance(chosen.get(several), str):
            chosen[several] = re.sub("[,+]", " ", chosen[several])
    name, written = MethodSpec.split(method)
    return study_from(settings), MethodSpec.build(name, {**written, **chosen})


def read_profile(path: str | PathLike[str]) -> ImportanceProfile:
    """Read an importance profile from its JSON file.

    Raises:
        ConfigError: the file cannot be read.
        AllocationError: it is not an importance profile.
    """
    try:
        text = read_text(Path(path))
    except Unreadable as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error
    from adaptive_lora.methods.importance import ImportanceProfile

    return ImportanceProfile.from_json(text)


def _measured(profile: ImportanceProfile | str | PathLike[str]) -> ImportanceProfile:
    """Return a profile, read where its file is given.

    Raises:
        ConfigError: it is no profile, or the file cannot be read.
        AllocationError: the file is not an importance profile.
    """
    if isinstance(profile, str | PathLike):
        return read_profile(profile)
    if not hasattr(profile, "spectra"):
        raise ConfigError(f"required a profile from al.profile, or its file; got {type(profile).__name__}.")
    return profile


def allocate(
    profile: ImportanceProfile | str | PathLike[str],
    budget: int | str,
    method: str | None = None,
    *,
    model: PreTrainedModel | str | PathLike[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> PlanReport:
    """Return the plan that spends a budget by a measured importance.

    Args:
        profile: importance from `profile` or `adaptive-lora profile`, or its file.
        budget: number of trainable parameters, or `uniform-R` for those of uniform rank R.
        method: method that follows the profile; None: `waterfill` where the metric gives the gain of every rank,
            else `empirical`.
        model: model that was profiled, as in `plan`, for the estimate of memory and the share of all parameters; None:
            the sites in the profile are planned, without these.
        seed: seed of methods that draw at random.
        **options: further options of the method and settings, as in `plan`.

    Raises:
        ConfigError: unknown method or option, or a value out of limits.
        AllocationError: the method does not follow this metric, the budget cannot be met, or the profile was written
            by an earlier version, without its sites, and no model is given.
    """
    if budget in (None, ""):
        raise ConfigError(f"budget must be a whole number of parameters or uniform-R; got {budget!r}.")
    measured = _measured(profile)
    method = method or ("empirical" if measured.spectra is None else "waterfill")
    _, spec = plan_request(method, {**options, "budget": budget})
    if spec.options.metric is None:
        raise AllocationError(
            f"{spec.label} follows no importance profile; required a method that does, such as waterfill, proportional "
            "or empirical."
        )
    given = {**options, "budget": budget}
    if "metric" not in MethodSpec.split(method)[1]:
        given = {"metric": measured.metric, **given}
    if model is not None:
        return plan(model, method, profile=measured, seed=seed, **given)
    from adaptive_lora.runner.plan import plan_profiled

    return plan_profiled(*plan_request(method, given), measured, seed=seed)


def lora_config(
    model: PreTrainedModel | str | PathLike[str],
    method: str = "uniform",
    *,
    dataloader: Iterable[Any] | None = None,
    loss: OwnLoss | None = None,
    batches: int = 16,
    profile: ImportanceProfile | str | PathLike[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> LoraConfig:
    """Return a stock `peft.LoraConfig` with the ranks of a method for a model.

    Args:
        model: model without adapters, such as one of transformers; with weights where the method measures. Else a name
            works too, as in `plan`.
        method: name of a method, or `NAME:option=value,...` as on the command line.
        dataloader: batches of training data, for methods that follow an importance profile.
        loss: function from model and batch to the mean loss; None: the model's own.
        batches: maximum number of batches to read, 2 or more.
        profile: profile measured before, or its file, in place of a loader.
        dropout: PEFT's `lora_dropout`.
        seed: seed of methods that draw at random.
        **options: options of the method and settings, as in `plan`.

    Raises:
        ConfigError: a LoraConfig cannot hold what the method does, such as ranks that change in training.
        AdaptiveLoraError: the model, the batches or the options cannot be used.
    """
    _, spec = plan_request(method, options)
    _require_stock(spec)
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ConfigError(f"dropout must be a number of at least 0 and below 1; got {dropout!r}.")
    metric = spec.options.metric
    if dataloader is not None and profile is not None:
        raise ConfigError("required a dataloader to measure on, or the profile that was measured before; got both.")
    if metric is None and dataloader is not None:
        logging.getLogger(__name__).warning("%s follows no measurement: the dataloader is not read.", spec.label)
    if loss is not None and dataloader is None and (metric is None or profile is not None):
        logging.getLogger(__name__).warning("%s measures nothing here: the loss is not used.", spec.label)
    if metric is not None and profile is None:
        from adaptive_lora.methods.importance.own_batches import profile as measure

        profile = measure(model, dataloader, metric=metric, loss=loss, batches=batches, seed=seed, experts=spec.experts)
    report = plan(model, method, profile=profile, seed=seed, **options)
    assert isinstance(report.plan, RankPlan)
    if report.plan.lr_multipliers() or report.plan.lora_plus != 1:
        raise ConfigError(f"{spec.label} needs learning rates of its own, which no LoraConfig holds; use a study.")
    from adaptive_lora.methods.adapters.attach import lora_config as stock

    return stock(report.required_base(), report.plan, dropout, report.head)


def audit(adapted: PeftModel, plan: Plan | PlanReport) -> None:
    """Check that every rank, alpha, factor and shape of a PEFT model is the planned one.

    Args:
        adapted: model from `peft.get_peft_model`.
        plan: plan that it should have been built by.

    Raises:
        AdapterError: it is no PEFT model, or it differs, or trains other parameters; the message lists all differences.
    """
    made = getattr(plan, "plan", plan)
    if not isinstance(made, RankPlan | TunerPlan):
        raise AdapterError(f"required the plan that al.plan or al.allocate returned; got {type(plan).__name__}.")
    from adaptive_lora.methods.adapters.attach import ADAPTER
    from adaptive_lora.methods.adapters.audit import audit_as_built, audit_tuner

    configs = getattr(adapted, "peft_config", None)
    if not configs or ADAPTER not in configs:
        raise AdapterError(
            f"{type(adapted).__name__} has no adapter named {ADAPTER!r}; required the model from peft.get_peft_model."
        )
    head = tuple(getattr(configs[ADAPTER], "modules_to_save", None) or ())
    if isinstance(made, TunerPlan):
        audit_tuner(adapted, made.tensors, head)
    else:
        audit_as_built(adapted, made, head)


def _require_own(spec: MethodSpec, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that say how a model is loaded, where it is loaded already."""
    if given := sorted(set(_OF_A_NAME) & set(options)):
        raise ConfigError(f"{', '.join(given)} applies to a model given by its name; this one is loaded already.")
    if spec.base != BaseStorage.FULL:
        raise ConfigError(
            f"base={spec.base} is how a model is loaded, and this one is loaded already: load it in 4 bit with "
            "transformers' BitsAndBytesConfig, and leave base out."
        )


def _require_stock(spec: MethodSpec) -> None:
    """Raise ConfigError for a method that no LoraConfig can express."""
    if not spec.options.gives_ranks:
        raise ConfigError(f"{spec.label} gives no LoRA ranks, so that there is no LoraConfig for it; use a study.")
    if not spec.is_plain_lora:
        raise ConfigError(
            f"{spec.label} changes ranks or weights before or in training, which no LoraConfig holds; use a study, or "
            "a method whose ranks are fixed, such as waterfill."
        )
