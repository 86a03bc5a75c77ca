"""Checks of a base's files before torch is loaded: a GGUF file, or quantised weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config.sections import ModelConfig
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.serving.gguf_file import gguf_in, require_gguf
from adaptive_lora.serving.quantised import SavedQuantisation, saved_quantisation
from adaptive_lora.serving.safety import UnsafeFiles


def check_base(config: ModelConfig, kinds: Iterable[str]) -> Path | None:
    """Check the files of a base on this machine without loading it.

    Args:
        config: settings of the base model.
        kinds: option `base` of every method.

    Returns:
        The path of its GGUF file, or None; see `base_file`.

    Raises:
        ModelError: a folder or GGUF file is missing or cannot be read, or weights have an unsupported format.
        ConfigError: a method's `base` does not fit how the weights are saved.
    """
    file = place = base_file(config)
    if place is None and config.model != "embedded" and Path(config.model).is_dir():
        place = Path(config.model)
    if place is not None:
        require_kinds(place, kinds)
    return file


def require_kinds(place: Path, kinds: Iterable[str]) -> SavedQuantisation | None:
    """Return the quantisation of the saved weights; check that the methods fit it.

    Args:
        place: model folder or GGUF file.
        kinds: option `base` of the methods to be trained on it.

    Raises:
        ModelError: weights have a format on which no adapter can be trained here.
        ConfigError: a method's `base` does not fit how the weights are saved.
    """
    if place.is_file():
        saved = SavedQuantisation("GGUF", "dequantised")
    elif (found := saved_quantisation(place)) is not None:
        saved = found
    else:
        return None
    if not saved.use:
        raise ModelError(
            f"{place} is saved in {saved.name}: required weights as trained, in bitsandbytes' 4 or "
            "8 bit, in FP8 or a GGUF file, because over others adapters are neither trained nor "
            "merged here. Give the model that it was quantised from, with base=nf4 in the method where "
            "memory is short (uniform:rank=8,base=nf4)."
        )
    for kind in kinds:
        if saved.use == "nf4" and kind != BaseStorage.NF4:
            raise ConfigError(
                f"{place} is saved in {saved.name}: required base=nf4 in every method (such as "
                f"uniform:rank=8,base=nf4), or the model that it was quantised from; got base={kind}."
            )
        if saved.use == "dequantised" and kind != BaseStorage.FULL:
            raise ConfigError(
                f"base={kind} does not apply to {place}, whose weights are saved in {saved.name} "
                "and dequantised; leave base out."
            )
    return saved


def base_file(config: ModelConfig) -> Path | None:
    """Return the path of the base's GGUF file, with its header checked; None for other bases.

    Raises:
        ModelError: the file, or a folder given by its path, is missing or cannot be read, or a folder holds several.
        ConfigError: a setting that does not apply to a GGUF file.
    """
    if config.model == "embedded":
        return None
    place = Path(config.model)
    if place.suffix.lower() == ".gguf" and not place.exists():
        raise ModelError(f"base model file {config.model} does not exist; check the path.")
    try:
        file = gguf_in(place)
        if file is not None:
            require_gguf(file)
    except (UnsafeFiles, ImportError) as error:
        raise ModelError(str(error)) from error
    except PermissionError as error:
        raise ModelError(f"{config.model} cannot be read: {error.strerror}") from error
    if file is None:
        if not place.is_dir() and (config.model.startswith((".", "/", "~")) or config.model.count("/") > 1):
            raise ModelError(f"base model folder {config.model} does not exist; check the path.")
        return None
    for name, given in {"revision": config.revision is not None, "trust_remote_code": config.trust_remote_code}.items():
        if given:
            raise ConfigError(
                f"{name} does not apply to {file}: a GGUF file has no revisions and holds no code; leave {name} out."
            )
    return file.absolute()
