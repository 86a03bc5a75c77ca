"""`plan --emit`: a plan in the form that a fine-tuning tool reads.

What each tool reads was taken from its code: axolotl 0.19.0, LLaMA-Factory 0.9.5, torchtune 0.6.1, Unsloth 2026.10.9.
axolotl and Unsloth hand ranks per module to PEFT, whose patterns are regular expressions for the end of a name, so all
forms have full names. LLaMA-Factory and torchtune know one rank; LLaMA-Factory continues from a saved adapter, whose
ranks are kept: at its start B is zero and A follows from a seed, so it can be written without the base's weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.start import Start
from adaptive_lora.errors import ConfigError, unknown_name
from adaptive_lora.interruption import replacing

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from adaptive_lora.runner.plan import PlanReport

FORMS = ("peft", "axolotl", "llamafactory", "torchtune", "unsloth")
"""Names of the forms."""
_READ = {
    "axolotl": "axolotl reads whole numbers as alphas",
    "llamafactory": "LLaMA-Factory reads one lora_rank and one whole lora_alpha",
    "torchtune": "torchtune's builders read one lora_rank and one lora_alpha, for the same modules of every layer",
}
"""Form -> what its tool reads, the reason for a refusal."""
_HOLDS = {
    "peft": (),
    "axolotl": ("lora_plus", "nf4"),
    "llamafactory": ("lora_plus", "nf4"),
    "torchtune": ("nf4",),
    "unsloth": (),
}
"""Form -> settings of a plan beside ranks and alphas that it has."""
_BY_WEIGHT = ("axolotl", "unsloth")
"""Forms with weights that are adapted by their names (PEFT's target_parameters), such as stacks of experts."""
_START = {"axolotl": "lora_model_dir", "llamafactory": "adapter_name_or_path"}
"""Form -> key of the folder of an adapter that training starts from."""
_PREPARED = {
    Start.CORDA: "peft.tuners.lora.corda.preprocess_corda on the base before get_peft_model",
    Start.EVA: "peft.initialize_lora_eva_weights with batches after get_peft_model",
    Start.LOFTQ: "the weights in full precision and a GPU, as PEFT stores them in 4 bit itself",
    Start.LORA_GA: "peft.tuners.lora.preprocess_loraga on the base before get_peft_model",
}
"""Start -> what PEFT needs for it beside the configuration."""
_TORCHTUNE_TYPES = ("gemma", "gemma2", "llama", "mistral", "qwen2")
"""Model types that torchtune has builders with LoRA for, under the module names of transformers."""
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
"""Module of transformers -> torchtune's name for it."""
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Emitted:
    """A plan in the form of one tool."""

    form: str
    """Name of the form."""
    text: str
    """Content of the tool's file: JSON, or YAML to put into a configuration."""
    caveats: tuple[str, ...]
    """Properties of the plan that the form does not have, and what to add to it, in sentences."""


def emit(report: PlanReport, form: str, *, adapter: Path | None = None, seed: int = 0) -> Emitted:
    """Return a plan in the form of a tool.

    Args:
        report: the plan, with its base.
        form: one of `FORMS`.
        adapter: new folder for the adapter that training starts from, for `axolotl` and `llamafactory`; the tool
            keeps its ranks and alphas.
        seed: seed of that adapter's A, as of a trial.

    Raises:
        ConfigError: the tool cannot read the plan; the message has the reason.
    """
    if form not in FORMS:
        raise ConfigError(unknown_name("form", form, FORMS))
    if adapter is not None and form not in _START:
        raise ConfigError(f"--adapter is for --emit {' and '.join(_START)}; {form} takes no folder. Leave it out.")
    caveats = _caveats(report, form)
    if form == "peft":
        return Emitted(form=form, text=_peft(report), caveats=caveats)
    plan = report.plan
    if not isinstance(plan, RankPlan):
        raise ConfigError(
            f"{plan.method} trains {plan.family}, which has no ranks: required a method of LoRA for --emit {form}; "
            "PEFT's own tuners have --emit peft."
        )
    from adaptive_lora.methods.adapters.attach import lora_config

    config = lora_config(report.required_base(), plan, 0.0, report.head)
    if config.target_parameters and (form not in _BY_WEIGHT or adapter is not None):
        what = "the start of --adapter is that of modules" if form in _BY_WEIGHT else f"{form} reads modules"
        raise ConfigError(
            f"{plan.method} adapts {len(config.target_parameters)} weights by target_parameters, such as "
            f"{config.target_parameters[0]}: required --emit peft, axolotl or unsloth "
            f"without --adapter, because {what} alone."
        )
    settings, further = _WRITERS[form](report, plan, config, adapter)
    if adapter is not None:
        _write_start(report, plan, config, adapter, seed)
    if form == "unsloth":
        return Emitted(form=form, text=json.dumps(settings, indent=1), caveats=(*caveats, *further))
    title = (
        f"# {plan.method}: {plan.trainable_parameters:,} parameters at {len(plan.entries)} sites, by adaptive-lora\n"
    )
    text = title + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return Emitted(form=form, text=text.rstrip("\n"), caveats=(*caveats, *further))


def _caveats(report: PlanReport, form: str) -> tuple[str, ...]:
    """Return what the form does not have of a plan, in sentences."""
    found: list[str | None] = []
    plan = report.plan
    name = "LoraConfig" if form == "peft" else f"form of {form}"
    what = f"a {name}" if form == "peft" else f"the {name}"
    if isinstance(plan, RankPlan):
        if not report.spec.options.is_plain_lora:
            found.append(
                f"{plan.method} also sets initial weights or changes ranks in training; "
                f"the {name} has the ranks at the start alone"
            )
        if report.base_name.lower().endswith(".gguf"):
            found.append(
                "the base is a GGUF file: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file="
                f"{Path(report.base_name).name!r}) loads it, which PEFT's Auto classes do not"
            )
        if any(entry.lr_multiplier != 1 for entry in plan.entries):
            found.append(f"learning-rate multipliers are not part of {what}")
        if plan.lora_plus != 1 and "lora_plus" not in _HOLDS[form]:
            found.append(f"LoRA+ is a rate of the optimiser, not part of {what}")
        found += _start_caveats(plan, form)
        if plan.base == BaseStorage.NF4 and "nf4" not in _HOLDS[form]:
            found.append(f"the base in 4 bit (base={plan.base}) is an option of loading it, not part of {what}")
    return tuple(filter(None, [*found, report.note]))


def _start_caveats(plan: RankPlan, form: str) -> list[str]:
    """Return what a tool needs to be told of a plan's initial weights and of a frozen A, in sentences."""
    found = []
    if plan.init is not Start.DEFAULT and form != "peft":
        found.append(f"the initial weights (init={plan.init}) are not part of the form of {form}")
    elif plan.init in _PREPARED:
        found.append(f"init_lora_weights={str(plan.init)!r} needs {_PREPARED[plan.init]}")
    elif plan.init.is_subtracted:
        found.append("PEFT changes the base's weights for it; save with path_initial_model_for_weight_conversion")
    if plan.invocation is not None:
        found.append(f"aLoRA needs alora_invocation_tokens, the base's token ids of {plan.invocation!r}")
    if plan.frozen_a:
        found.append("LoRA-FA is a choice of what is trained: set requires_grad of every lora_A to false")
    return found


def _peft(report: PlanReport) -> str:
    """Return the `adapter_config.json` from which stock PEFT builds exactly this plan."""
    from adaptive_lora.methods.adapters.attach import lora_config
    from adaptive_lora.methods.adapters.tuners import CONFIGURATIONS

    plan = report.plan
    if isinstance(plan, RankPlan):
        config: PeftConfig = lora_config(report.required_base(), plan, 0.0, report.head)
    elif plan.family in CONFIGURATIONS:
        config = CONFIGURATIONS[plan.family](report.required_base(), plan.settings)
    else:
        raise ConfigError(f"{plan.method} has no PEFT configuration: PEFT does not build it.")
    config.base_model_name_or_path = report.base_name
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")


_Written = tuple[dict[str, Any], tuple[str, ...]]
"""Settings of a tool, and caveats of its form."""


def _axolotl(report: PlanReport, plan: RankPlan, config: LoraConfig, adapter: Path | None) -> _Written:
    packed = plan.base == BaseStorage.NF4
    settings: dict[str, Any] = {
        "base_model": report.base_name,
        "adapter": "qlora" if packed else "lora",
        **({"load_in_4bit": True} if packed else {}),
    }
    if adapter is not None:
        settings[_START["axolotl"]] = str(adapter)
    elif _fractional(plan):
        raise _unread("axolotl", plan, f"has the alpha {_fractional(plan)}", start=True)
    else:
        settings |= {
            "lora_r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_target_modules": _targets(report, plan, config),
            **_where_given(
                lora_target_parameters=config.target_parameters,
                lora_rank_pattern=config.rank_pattern,
                lora_alpha_pattern=config.alpha_pattern,
                lora_fan_in_fan_out=config.fan_in_fan_out,
                lora_modules_to_save=list(report.head),
                peft_use_rslora=config.use_rslora,
                peft_use_dora=config.use_dora,
            ),
        }
    return {**settings, **_lora_plus(plan)}, ()


def _llamafactory(report: PlanReport, plan: RankPlan, config: LoraConfig, adapter: Path | None) -> _Written:
    settings: dict[str, Any] = {
        "model_name_or_path": report.base_name,
        "finetuning_type": "lora",
        **({"quantization_bit": 4} if plan.base == BaseStorage.NF4 else {}),
    }
    if adapter is not None:
        if "," in str(adapter):
            raise ConfigError(f"LLaMA-Factory splits {adapter} at its comma; give a folder without one to --adapter.")
        settings[_START["llamafactory"]] = str(adapter)
        return {**settings, **_lora_plus(plan)}, ()
    targets = _targets(report, plan, config)
    towers = {site.tower for site in report.sites}
    if config.rank_pattern or config.alpha_pattern:
        raise _unread("llamafactory", plan, f"has {_span(plan)}", start=True)
    if _fractional(plan):
        raise _unread("llamafactory", plan, f"has the alpha {_fractional(plan)}", start=True)
    if len(towers) > 1 or isinstance(targets, str):  # it selects modules by parts of their names, and leaves towers out
        raise _unread("llamafactory", plan, "is for modules that lora_target cannot name exactly", start=True)
    settings |= {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_target": ",".join(targets),
        **_where_given(use_rslora=config.use_rslora, use_dora=config.use_dora, additional_target=",".join(report.head)),
    }
    return {**settings, **_lora_plus(plan)}, ()


def _torchtune(report: PlanReport, plan: RankPlan, config: LoraConfig, adapter: Path | None) -> _Written:
    kind = str(getattr(getattr(report.base, "config", None), "model_type", ""))
    if config.rank_pattern or config.alpha_pattern:
        raise _unread("torchtune", plan, f"has {_span(plan)}")
    if kind not in _TORCHTUNE_TYPES or report.head:
        raise ConfigError(
            f"torchtune has no builder with LoRA for {'a trained head' if report.head else f'model type {kind!r}'}, "
            f"or none whose modules are those of transformers; required one of {', '.join(_TORCHTUNE_TYPES)}."
        )
    layers: dict[int, set[str]] = {site.layer: set() for site in report.sites}
    for entry in plan.entries:
        layers[entry.site.layer].add(entry.site.name.rpartition(".")[2])
    own = next(iter(layers.values()))
    attention = [name for module, name in _ATTENTION.items() if module in own]
    if any(modules != own for modules in layers.values()):
        raise _unread("torchtune", plan, "adapts other modules in some layers")
    if not attention or own & _FEED_FORWARD not in (set(), _FEED_FORWARD):
        raise _unread(
            "torchtune", plan, f"adapts {', '.join(sorted(own))}: required one of attention, and all or none of the MLP"
        )
    entry = plan.entries[0]
    alpha = plan.scale_of(entry) * entry.rank  # its factor is always alpha / rank
    settings = {
        "lora_attn_modules": attention,
        "apply_lora_to_mlp": bool(own & _FEED_FORWARD),
        "lora_rank": entry.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        **_where_given(use_dora=config.use_dora, quantize_base=plan.base == BaseStorage.NF4),
    }
    caveats = ["`_component_` is the builder of your base, such as torchtune.models.llama3_2.lora_llama3_2_1b"]
    if plan.base == BaseStorage.NF4:
        caveats.append("torchtune packs weights by torchao, with other rounding than bitsandbytes")
    return {"model": settings}, tuple(caveats)


def _unsloth(report: PlanReport, plan: RankPlan, config: LoraConfig, adapter: Path | None) -> _Written:
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": _targets(report, plan, config),
        # Unsloth adds routed experts to modules of these names where it is given none.
        **({"target_parameters": config.target_parameters or []} if report.architecture.experts else {}),
        **_where_given(
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            fan_in_fan_out=config.fan_in_fan_out,
            modules_to_save=list(report.head),
        ),
    }
    caveats = ["pass these as keywords: FastLanguageModel.get_peft_model(model, **settings)"]
    if report.head:
        caveats = ["pass these to FastModel.get_peft_model(model, **settings); FastLanguageModel's trains no head"]
    return settings, tuple(caveats)


_WRITERS: Mapping[str, Callable[[PlanReport, RankPlan, LoraConfig, Path | None], _Written]] = {
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "torchtune": _torchtune,
    "unsloth": _unsloth,
}


def _unread(form: str, plan: RankPlan, reason: str, *, start: bool = False) -> ConfigError:
    """Return the error about a plan that a tool cannot read."""
    way = (
        f"give --adapter FOLDER for an untrained adapter of this plan, which {form} starts from ({_START[form]})"
        if start
        else "take --emit peft, axolotl or unsloth, which have ranks per module"
    )
    return ConfigError(f"{_READ[form]}, and {plan.method} {reason}; {way}.")


def _where_given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value}


def _lora_plus(plan: RankPlan) -> dict[str, float]:
    return {} if plan.lora_plus == 1 else {"loraplus_lr_ratio": plan.lora_plus}


def _span(plan: RankPlan) -> str:
    """Return the ranks of a plan, or its alphas where ranks are equal, in words."""
    ranks = sorted({entry.rank for entry in plan.entries})
    if len(ranks) > 1:
        return f"ranks from {ranks[0]} to {ranks[-1]}"
    alphas = sorted({entry.alpha for entry in plan.entries})
    return f"alphas from {alphas[0]:g} to {alphas[-1]:g}"


def _fractional(plan: RankPlan) -> str:
    """Return the first alpha that is no whole number, with its site; empty: there is none."""
    return next((f"{e.alpha:g} at {e.site.name}" for e in plan.entries if not float(e.alpha).is_integer()), "")


def _targets(report: PlanReport, plan: RankPlan, config: LoraConfig) -> list[str] | str:
    """Return the adapted modules as PEFT reads them, by their last names where these select no other module."""
    from adaptive_lora.methods.adapters.attach import module_targets

    if config.target_parameters:  # which the plan's other sites are
        named: Any = config.target_modules
        return named if isinstance(named, str) else sorted(named or ())
    names = [entry.site.name for entry in plan.entries]
    short = sorted({name.rpartition(".")[2] for name in names})
    base = report.required_base()
    selected = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in short}
    return short if selected == set(names) else module_targets(base, names)


def _write_start(report: PlanReport, plan: RankPlan, config: LoraConfig, adapter: Path, seed: int) -> None:
    """Write the adapter that LoRA's training starts from: B is zero, and A that of a trial with this seed.

    Raises:
        ConfigError: the folder is not empty, or the start depends on weights of the base.
    """
    if plan.dora or report.head or plan.init is not Start.DEFAULT:
        what = "DoRA magnitudes" if plan.dora else f"init={plan.init}"
        raise ConfigError(
            f"the start of {'a trained head' if report.head else what} depends on the base's weights, "
            f"which `plan` does not read; required plain LoRA for --adapter, got {plan.method}."
        )
    from adaptive_lora.methods.adapters.attach import initial_a
    from adaptive_lora.methods.adapters.export import refuse_occupied

    refuse_occupied(adapter)
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for entry in plan.entries:
        site, name = entry.site, f"base_model.model.{entry.site.name}.lora_"
        tensors[f"{name}A.weight"] = initial_a(seed, site.name, entry.rank, site.in_features)
        tensors[f"{name}B.weight"] = torch.zeros(site.out_features, entry.rank)
    config.base_model_name_or_path = report.base_name
    with replacing(adapter) as folder:
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
