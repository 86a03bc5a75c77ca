"""Adapters on disk: saved with a reference to their base, and exported as every server reads them.

A saved adapter is a folder in PEFT's or the custom tuners' format. An export has one rank and scale 1, or is merged.

Servers interpret PEFT's patterns differently: older vLLM and SGLang apply one alpha / r to every
site, llama.cpp one alpha over each site's own rank. With one rank, an alpha equal to it and the
scales folded into B, all of them compute the same.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, Template
from peft import LoraConfig, PeftConfig, convert_to_lora
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from adaptive_lora import serving
from adaptive_lora.allocation import Plan, TunerPlan
from adaptive_lora.allocation.tuner_plan import read_plan
from adaptive_lora.errors import AdapterError, ConfigError, brief
from adaptive_lora.interruption import replacing
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.adapters.tuners import save_custom_tuner
from adaptive_lora.methods.peft_types.table import TYPES
from adaptive_lora.models.errors import is_bug, model_errors
from adaptive_lora.serving import CAUSAL, RECORD, TASKS
from adaptive_lora.serving.custom_tuner import AdaptedModel
from adaptive_lora.serving.safety import CONFIG, FAMILY, WEIGHTS, UnsafeFiles, read_json, read_record, require_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from adaptive_lora.models.base import BaseReference

SERVED_RANKS = (8, 16, 32, 64, 128, 256)
"""Values that vLLM accepts for its maximum LoRA rank."""
_LOST = 1e-8
"""Largest share of the squared norm of a site's update that a conversion to LoRA may lose."""
_TENSOR = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<side>[AB])\.weight")
_TRAINED = re.compile(r"trained[\w.-]*\.(safetensors|json)")
"""Pattern of the weights of a custom tuner, in one file or several with an index."""
_PLAIN = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not change the base's weights."""


def save_adapter(
    adapted: PeftModel | AdaptedModel,
    folder: Path,
    *,
    plan: Plan,
    base: BaseReference,
    dtype: str,
    template: Mapping[str, str],
    task: Mapping[str, Any] = CAUSAL,
    quantisation: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder that `adapter_serving` serves; stock PEFT loads it if it is PEFT's.

    Args:
        adapted: the trained model.
        folder: folder to write to; created if missing.
        plan: plan of the adapter, written as `rank_plan.json`.
        base: reference and content hash of the base.
        dtype: type of the base's weights in training, such as `float32`.
        template: prompt template for serving.
        task: record of the task.
        quantisation: record of a quantised base; its content hash is that of the weights before quantisation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapted, AdaptedModel):
        assert isinstance(plan, TunerPlan)
        save_custom_tuner(adapted, folder, plan)
    else:
        config = adapted.peft_config["default"]
        config.base_model_name_or_path = base.name
        config.revision = base.revision
        # Embeddings are never trained here; PEFT's check for resized ones would download the base.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    record: dict[str, Any] = {
        "base": base.to_dict(),
        "dtype": dtype,
        "template": dict(template),
        "task": dict(task),
        **({} if quantisation is None else {"quantisation": dict(quantisation)}),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "rank_plan.json").write_text(plan.to_json(), encoding="utf-8")
    origin, ranks = {**record, "method": plan.method}, list[int]()
    if isinstance(plan, TunerPlan):
        origin["family"] = plan.family
    else:
        ranks += plan.built.rank_pattern().values()
    write_card(folder, "trained", origin, ranks=ranks)  # PEFT's own is an empty template


@cache
def _card() -> Template:
    """Return the template of a README."""
    beside = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=beside, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return templates.get_template("model_card.md.jinja")


def write_card(folder: Path, kind: str, origin: Mapping[str, Any], **values: Any) -> None:
    """Write the README of an adapter or merged model.

    Args:
        folder: folder to write to.
        kind: `trained`, `uniform` or `merged`.
        origin: record of the adapter, with its method and family where known.
        values: `ranks` as trained, the `rank` of a uniform one, whether a merged one was `dora`, and the facts of a
            `published` one.
    """
    text = _card().render(
        kind=kind,
        origin=origin,
        auto_class=TASKS[origin.get("task", CAUSAL)["name"]].auto_class,
        gguf_file=repr(Path(origin["base"]["name"]).name),
        **values,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def copy_trained(source: Path, target: Path, published: Mapping[str, Any]) -> None:
    """Copy the files of an adapter that loading it needs, with a card that has further facts.

    Args:
        source: adapter folder.
        target: folder to create; must not exist or be empty.
        published: facts of the card, from `runner.publication`.

    Raises:
        AdapterError: the folder is incomplete.
        ConfigError: the target is not empty.
    """
    refuse_occupied(target)
    origin = origin_of(source)
    if "method" not in origin:
        raise AdapterError(f"{source} has no rank_plan.json, which lists its ranks; required to publish it as trained.")
    plan = read_plan(read_json(source / "rank_plan.json"))
    kept = (CONFIG, WEIGHTS, FAMILY, RECORD, "rank_plan.json")
    with replacing(target) as folder:
        folder.mkdir()
        for path in sorted(source.iterdir()):
            if path.name in kept or _TRAINED.fullmatch(path.name):
                shutil.copy(path, folder)
        ranks = [] if isinstance(plan, TunerPlan) else list(plan.built.rank_pattern().values())
        write_card(folder, "trained", origin, ranks=ranks, published=published)


def export_uniform(
    source: Path, target: Path, *, trust_remote_code: bool = False, published: Mapping[str, Any] | None = None
) -> int:
    """Write an adapter with one rank at every site; return that rank.

    A is padded with rows and B with columns of zeros: B'·A' = scale·B·A at every site. PEFT's other types of adapters
    whose update is a matrix are converted to LoRA first.

    Args:
        source: adapter folder; its base is needed only to convert it.
        target: folder to create; must not exist or be empty.
        trust_remote_code: whether to run the base's own Python code.
        published: further facts of the card, where it is to be published.

    Raises:
        AdapterError: the adapter is not plain LoRA and cannot be converted, or has a rank above `SERVED_RANKS`.
        ConfigError: the target is not empty.
    """
    refuse_occupied(target)
    config, tensors = _converted(source, trust_remote_code) if peft_type_of(source) in TYPES else _read(source)
    origin = origin_of(source)
    pairs = _pairs(tensors)
    ranks = [a.shape[0] for a, _ in pairs.values()]
    rank = next((served for served in SERVED_RANKS if served >= max(ranks)), None)
    if rank is None:
        raise AdapterError(
            f"{source} has a site of rank {max(ranks)}; servers take at most {SERVED_RANKS[-1]}; "
            "export it with --merged."
        )
    written: dict[str, Tensor] = {}
    for site, (a, b) in pairs.items():
        name, room = f"base_model.model.{site}.lora_", rank - a.shape[0]
        scaled = (b.float() * _scale(config, site, a.shape[0])).to(b.dtype)
        written[f"{name}A.weight"] = pad(a, (0, 0, 0, room)).contiguous()
        written[f"{name}B.weight"] = pad(scaled, (0, room)).contiguous()
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora, config.init_lora_weights, config.inference_mode = False, True, True
    with replacing(target) as folder:
        folder.mkdir()
        save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        shutil.copy(source / RECORD, folder)
        write_card(folder, "uniform", origin, ranks=ranks, rank=rank, published=published)
    return rank


def export_merged(
    source: Path, target: Path, *, trust_remote_code: bool = False, published: Mapping[str, Any] | None = None
) -> None:
    """Merge an adapter into its base's weights and write a plain transformers folder.

    Args:
        source: adapter folder; its base must be available and unchanged.
        target: folder to create; must not exist or be empty.
        trust_remote_code: whether to run the base's own Python code.
        published: further facts of the card, where it is to be published.

    Raises:
        AdapterError: the base or adapter cannot be loaded or merged.
        ConfigError: the target is not empty.
    """
    refuse_occupied(target)
    try:
        model, tokenizer, _ = serving.load_adapter(source, dequantise=True, trust_remote_code=trust_remote_code)
        _refuse_tied(model)
        config = getattr(model, "peft_config", {}).get("default")  # custom tuners have none
        if getattr(config, "alora_invocation_tokens", None):
            raise AdapterError(
                f"{source} acts from its invocation tokens on alone (aLoRA), which merged weights cannot; serve the "
                "adapter as it is."
            )
        dora = bool(getattr(config, "use_dora", False))
        merged = model.merge_and_unload(safe_merge=True)
    except AdapterError:
        raise
    except Exception as error:  # PEFT, transformers and safetensors raise their own types
        if is_bug(error):
            raise
        raise AdapterError(f"adapter {source} cannot be merged: {brief(error)}") from error
    with replacing(target) as folder:
        with model_errors(f"the merged model of {source} cannot be saved", merged):
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_card(folder, "merged", origin_of(source), dora=dora, published=published)


def _refuse_tied(model: Any) -> None:
    """Refuse to merge where several sites share one weight and have different adapters.

    Raises:
        AdapterError: there are such sites (Zamba2's shared blocks); the message names two.
    """
    if not hasattr(model, "peft_config"):
        return
    first: dict[int, str] = {}
    for name, layer in lora_layers(model).items():
        weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
        other = first.setdefault(id(weight), name)
        if other != name:
            raise AdapterError(
                f"{other} and {name} share one weight and have an adapter each, which a merged "
                "model cannot hold; serve the adapter as it is, or export it with --uniform."
            )


def refuse_occupied(target: Path) -> None:
    """Raise ConfigError if the target is a file or a folder that is not empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty; give a new folder for the export.")


def peft_type_of(source: Path) -> str | None:
    """Return PEFT's type of an adapter folder, or None where it is a custom tuner's or cannot be read."""
    with suppress(UnsafeFiles):
        return str(read_json(source / CONFIG).get("peft_type"))
    return None


def _converted(source: Path, trust_remote_code: bool) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the configuration and tensors of the LoRA adapter that computes what another type of PEFT's does.

    Each site gets the least rank whose singular values hold all but `_LOST` of the squared norm of its update.

    Raises:
        AdapterError: PEFT has no conversion of this type, or the adapter cannot be loaded.
    """
    with model_errors(f"adapter {source} cannot be converted to LoRA"):
        model, _, _ = serving.load_adapter(source, dequantise=True, trust_remote_code=trust_remote_code)
    try:
        config, tensors = convert_to_lora(model, 1 - _LOST)
    except TypeError as error:
        raise AdapterError(
            f"{source} is no LoRA adapter, and PEFT has no conversion of {peft_type_of(source)} to LoRA for its "
            "layers, which --uniform needs; export it with --merged."
        ) from error
    return config, tensors


def _read(source: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    try:
        require_adapter(source)
        family = read_json(source / FAMILY).get("family") if (source / FAMILY).is_file() else None
    except UnsafeFiles as error:
        raise AdapterError(str(error)) from error
    if family is not None:
        raise AdapterError(
            f"{source} is no LoRA adapter ({family}): required for --uniform, because servers read "
            "A and B alone; what was trained of the base's own weights can be exported --merged."
        )
    try:
        config = PeftConfig.from_pretrained(str(source))
        tensors = load_file(source / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterError(f"adapter {source} cannot be read: {brief(error)}") from error
    given = {
        "peft_type": type(config) is LoraConfig,
        "use_dora": not getattr(config, "use_dora", False),
        "bias": getattr(config, "bias", "none") == "none",
        "modules_to_save": not getattr(config, "modules_to_save", None),
        "alora_invocation_tokens": not getattr(config, "alora_invocation_tokens", None),
        "init_lora_weights": getattr(config, "init_lora_weights", True) in _PLAIN,
    }
    wrong = [f"{name}={getattr(config, name)}" for name, right in given.items() if not right]
    if wrong:
        remedy = "export it with --merged" if given["alora_invocation_tokens"] else "serve the adapter as it is"
        raise AdapterError(
            f"{source} is no plain LoRA adapter ({', '.join(wrong)}): required for --uniform, "
            f"because servers read A and B alone; {remedy}."
        )
    stacked = [name for name in config.target_parameters or () if not name.endswith(".weight")]
    if stacked:
        raise AdapterError(
            f"{source} adapts routed experts ({len(stacked)} stacks of weights, such as {min(stacked)}), which have a "
            "rank per expert: required linear layers for --uniform; export it with --merged."
        )
    return config, tensors


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return site -> (A, B)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise AdapterError(
                f"the adapter holds '{name}', which is neither A nor B of a linear layer; export it with --merged."
            )
        found.setdefault(match["site"], {})[match["side"]] = tensor
    if not found or any(sides.keys() != {"A", "B"} for sides in found.values()):
        raise AdapterError("the adapter does not hold one A and one B for every site.")
    return {site: (sides["A"], sides["B"]) for site, sides in found.items()}


def _scale(config: LoraConfig, site: str, rank: int) -> float:
    """Return PEFT's factor of B·A at a site, by its rule for patterns."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    if f"{site}.weight" in (config.target_parameters or ()):
        site = f"{site}.weight"
    key = get_pattern_key([*ranks, *alphas], site)
    stated, alpha = ranks.get(key, config.r), alphas.get(key, config.lora_alpha)
    if stated != rank:
        raise AdapterError(f"the adapter's configuration has rank {stated} at {site}, its A has rank {rank}.")
    return float(alpha) / (rank**0.5 if config.use_rslora else rank)


def origin_of(source: Path) -> dict[str, Any]:
    """Return the adapter's record, with the method of its plan where known."""
    try:
        record = read_record(source)
        plan = source / "rank_plan.json"
        if plan.is_file():
            values = read_json(plan)
            record["method"] = str(values.get("method", "unknown"))
            record["family"] = values.get("family")
    except UnsafeFiles as error:
        raise AdapterError(str(error)) from error
    return record
