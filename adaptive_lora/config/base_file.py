"""A base that is one GGUF file: found and checked before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from adaptive_lora.adapter_serving.gguf_file import gguf_in, require_gguf
from adaptive_lora.adapter_serving.vetting import UnsafeFiles
from adaptive_lora.config.sections import ModelConfig
from adaptive_lora.errors import ConfigError, ModelError


def dequantised_base(base: str, file: Path) -> str:
    """Return why a GGUF base is not quantised again."""
    return f"base={base} does not apply to {file}, whose weights are dequantised; leave base out."


def base_file(config: ModelConfig) -> Path | None:
    """Return the GGUF file that a base is, with its header checked; None where it is no file.

    Raises:
        ModelError: the file is missing or cannot be read, or a folder holds several.
        ConfigError: settings that a file does not take.
    """
    if config.model == "embedded":
        return None
    place = Path(config.model)
    if place.suffix.lower() == ".gguf" and not place.exists():
        raise ModelError(f"base model file {config.model} does not exist; check the path.")
    try:
        file = gguf_in(place)
        if file is None:
            return None
        require_gguf(file)
    except (UnsafeFiles, ImportError) as error:
        raise ModelError(str(error)) from error
    except PermissionError as error:
        raise ModelError(f"{config.model} cannot be read: {error.strerror}") from error
    for name, given in {
        "revision": config.revision is not None,
        "trust_remote_code": config.trust_remote_code,
    }.items():
        if given:
            raise ConfigError(
                f"{name} does not apply to {file}: a GGUF file has no revisions and holds no code; "
                f"leave {name} out."
            )
    return file.absolute()
