"""Safety checks of models and adapters from others: no files that run code, no corrupt files.

Weights are read from safetensors alone, because reading a pickle can run code. Python files of a
model run only with the user's permission. An adapter's configuration must not name modules to import,
other adapters to download, or patterns of unbounded matching time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .quantised import saved_quantisation

RECORD = "adaptive_lora.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FAMILY = "family.json"
_DTYPES = ("float32", "bfloat16", "float16")
_SOURCES = ("embedded", "folder", "hub", "gguf")
_POINTER = b"version https://git-lfs"
_LONGEST = 16 * 2**20
"""Maximum size of a JSON file in bytes; real ones are a hundred times smaller."""
_REACHES_OUT = ("adapters", "megatron_config", "tokenizer_kwargs", "trust_remote_code", "custom_modules")
"""Settings by which PEFT imports modules or downloads other files."""
_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_PLAIN_NAME = re.compile(r"[\w.^$|\\-]{0,100000}")
"""Pattern of escaped or listed names; repetitions and groups can take unbounded time."""
_SIZES = ("r", "num_virtual_tokens", "encoder_hidden_size", "num_attention_heads", "token_dim")


class UnsafeFiles(RuntimeError):
    """Files that are refused because they could run code, are corrupt, or contradict each other."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UnsafeFiles: the file is missing, too large, not JSON, nested too deeply, or not an object.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise UnsafeFiles(f"{path} has {path.stat().st_size:,} bytes; required {_LONGEST:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsafeFiles(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise UnsafeFiles(f"{path}: required a JSON object, got {type(values).__name__}")
    return values


def require_base(folder: Path, *, weights: bool, trust_remote_code: bool) -> None:
    """Check a base's files before transformers sees them.

    Args:
        folder: folder of the base.
        weights: whether its weights will be read.
        trust_remote_code: whether the user allows its Python files to run.

    Raises:
        UnsafeFiles: weights are pickled, corrupt or of an unknown quantisation, or code is not allowed.
    """
    if (folder / CONFIG).exists():
        raise UnsafeFiles(
            f"{folder} holds {CONFIG}: transformers would load that adapter with the model; give the base alone."
        )
    pickles = any(folder.glob("pytorch_model*.bin"))
    if weights and pickles and not any(folder.glob("*.safetensors")):
        raise UnsafeFiles(pickled(str(folder)))
    if weights:
        _require_numbers(folder)
    settings = read_json(folder / "config.json")
    foreign = sorted(name for name in named_code(folder) if "--" in name)
    if trust_remote_code and foreign:
        raise UnsafeFiles(
            f"{folder} takes its code from elsewhere ({foreign[0]}), where it can change without "
            "notice; copy the code into the folder."
        )
    kernels = [str(name) for name in _leaves(_attention(settings)) if "/" in str(name)]
    if kernels and not trust_remote_code:
        raise UnsafeFiles(
            f"{folder}/config.json asks for compiled code from the hub ({kernels[0]}); take that "
            "out, or say --trust-remote-code true."
        )


def named_code(folder: Path) -> list[str]:
    """Return the base's own Python classes of model and tokenizer, as named in its files."""
    tokenizer = folder / "tokenizer_config.json"
    files = (folder / "config.json", *([tokenizer] if tokenizer.is_file() else []))
    return [str(name) for file in files for name in _leaves(read_json(file).get("auto_map"))]


def _require_numbers(folder: Path) -> None:
    """Check that weights are complete files of plain floating-point numbers.

    transformers converts any file's numbers to floating point, also integers without their scales.
    """
    quantised = saved_quantisation(folder) is not None
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise UnsafeFiles(
                    f"{file} is a pointer of Git LFS, not the file itself; download it with `git lfs pull`."
                )
        for name, found in _slices(file).items():
            kind = str(found.get_dtype())
            if not quantised and name.endswith(".weight") and kind.startswith(("I", "U")):
                raise UnsafeFiles(
                    f"{file} has {name} in integers ({kind}), and config.json does not say "
                    "how it was quantised; give the model that it was quantised from."
                )


def pickled(name: str) -> str:
    """Return the message on pickled weights, with a command to convert them."""
    return (
        f"{name} has pickled weights only (pytorch_model*.bin), which can run code when they are "
        'read; required *.safetensors. Convert it once, if you trust it: python -c "from '
        "transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"n = {name!r}; M.from_pretrained(n, use_safetensors=False).save_pretrained('converted'); "
        "T.from_pretrained(n).save_pretrained('converted')\" and give the folder `converted`."
    )


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of an adapter folder: base, dtype, template and task.

    Raises:
        UnsafeFiles: the record is missing, corrupt or invalid.
    """
    _require_inside(folder, RECORD)
    record = read_json(folder / RECORD)
    base, template = record.get("base"), record.get("template")
    wrong = [
        name
        for name, right in {
            "base.source": isinstance(base, dict) and base.get("source") in _SOURCES,
            "base.name": isinstance(base, dict) and _is_text(base.get("name")),
            "base.revision": isinstance(base, dict) and (base.get("revision") is None or _is_text(base["revision"])),
            "base.content_hash": isinstance(base, dict)
            and re.fullmatch(r"[0-9a-f]{64}", str(base.get("content_hash"))) is not None,
            "base.stored_as": isinstance(base, dict) and (base.get("stored_as") is None or _is_text(base["stored_as"])),
            "dtype": record.get("dtype") in _DTYPES,
            "task": isinstance(record.get("task", {"name": ""}), dict)
            and isinstance(record.get("task", {"name": ""}).get("name"), str),
            "quantisation": record.get("quantisation")
            in (None, {"scheme": "nf4", "double": True}, {"scheme": "nf4", "double": False}),
            "template": template == {}  # for tasks without prompts
            or (
                isinstance(template, dict)
                and all(isinstance(template.get(key), str) for key in ("with_input", "without_input"))
            ),
        }.items()
        if not right
    ]
    if wrong:
        raise UnsafeFiles(f"{folder / RECORD}: missing or wrong: {', '.join(wrong)}")
    return record


def require_adapter(folder: Path) -> None:
    """Check an adapter's files before PEFT sees them.

    Raises:
        UnsafeFiles: weights are pickled or corrupt, or the configuration loads other files or code.
    """
    if not (folder / WEIGHTS).exists() and any(folder.glob("adapter_model*.bin")):
        raise UnsafeFiles(
            f"{folder} has pickled weights (adapter_model.bin), which can run code when they are "
            f"read; required {WEIGHTS}. PEFT writes it with `save_pretrained`."
        )
    if (folder / FAMILY).exists():  # a custom tuner
        _require_family(folder)
        return
    for name in (CONFIG, WEIGHTS):
        _require_inside(folder, name)
    config, place = read_json(folder / CONFIG), folder / CONFIG
    if not isinstance(config.get("peft_type"), str):
        raise UnsafeFiles(f"{place}: required the text peft_type, got {config.get('peft_type')!r}")
    reaching = [name for name in _REACHES_OUT if config.get(name)]
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library", "transformers") if isinstance(mapping, dict) else ""
    if str(library).split(".")[0] not in ("transformers", "transformers_modules"):
        reaching.append("auto_mapping")
    if reaching:
        raise UnsafeFiles(
            f"{place} has {', '.join(reaching)}, by which code or files from elsewhere would "
            "be loaded; such adapters are not read."
        )
    _require_plain_patterns(config, place)
    _require_sizes(config, place, shapes(folder))


def _require_family(folder: Path) -> None:
    """Check the adapter of a custom tuner before memory is allocated for it."""
    files = sorted(path.name for path in folder.glob("trained*.safetensors"))
    for name in (FAMILY, *files):
        _require_inside(folder, name)
    settings, place = read_json(folder / FAMILY), folder / FAMILY
    wrong = [
        name
        for name, kind in {"trained": list, "bottlenecks": dict, "nonlinearity": str}.items()
        if not isinstance(settings.get(name), kind)
    ]
    if wrong:
        raise UnsafeFiles(f"{place}: missing or wrong: {', '.join(wrong)}")
    tensors = {name: shape for file in files for name, shape in shapes(folder, file).items()}
    _require_sizes({"rank_pattern": settings["bottlenecks"]}, place, tensors)


def shapes(folder: Path, weights: str = WEIGHTS) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of an adapter's tensors, from the header alone.

    Raises:
        UnsafeFiles: the file is not a complete safetensors file.
    """
    return {name: tuple(found.get_shape()) for name, found in _slices(folder / weights).items()}


def _slices(file: Path) -> dict[str, Any]:
    """Return name -> safetensors' slice of a tensor, whose values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UnsafeFiles(f"{file} is corrupt: {_first_line(error)}") from error


def require_loaded(model: Any, folder: Path) -> None:
    """Check that PEFT loaded every tensor of the file and that all are finite; PEFT ignores unknown ones.

    Raises:
        UnsafeFiles: tensors are missing, unused or not finite.
    """
    import torch
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(set(loaded) ^ set(shapes(folder)))
    if wrong:
        raise UnsafeFiles(
            f"{folder / WEIGHTS} does not have the tensors of {CONFIG}: {len(wrong)} "
            f"are missing or unused, such as {wrong[0]}"
        )
    bad = next((name for name, tensor in loaded.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise UnsafeFiles(f"{folder / WEIGHTS}: {bad} holds NaN or infinity")


def _require_inside(folder: Path, name: str) -> None:
    """Check that a file exists and is inside the folder, or in the hub's cache of that folder."""
    path = folder / name
    if not path.is_file():
        raise UnsafeFiles(f"{folder} has no {name}; required an adapter folder")
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"  # the target of links in the hub's cache
    if not real.is_relative_to(home) and not (home.parent.name == "snapshots" and real.is_relative_to(blobs)):
        raise UnsafeFiles(f"{path} is a link to {real}, outside the adapter; copy the file itself")


def _require_sizes(config: Mapping[str, Any], place: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Check sizes before PEFT allocates memory for them: none is above the tensors' longest side."""
    largest = max((max(shape) for shape in tensors.values() if shape), default=0)
    for size in [*(config.get(name) for name in _SIZES), *_leaves(config.get("rank_pattern"))]:
        if size is not None and not (type(size) is int and 0 <= size <= largest):
            raise UnsafeFiles(
                f"{place} gives the size {size!r:.40}; required a whole number, at most "
                f"{largest}, the longest side of its tensors."
            )


def _require_plain_patterns(config: Mapping[str, Any], place: Path) -> None:
    ranks, alphas = config.get("rank_pattern"), config.get("alpha_pattern")
    for name, values in {
        "rank_pattern": list(ranks) if isinstance(ranks, dict) else ranks,
        "alpha_pattern": list(alphas) if isinstance(alphas, dict) else alphas,
        **{name: config.get(name) for name in _PATTERNS},
    }.items():
        for text in _leaves(values):
            if not isinstance(text, str) or not _PLAIN_NAME.fullmatch(text):
                raise UnsafeFiles(f"{place}: {name}: required names of modules, got {text!r:.60}")


def _leaves(values: Any) -> Iterator[Any]:
    """Yield the single values in nested lists and mappings; none for None."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value)
    elif values is not None:
        yield values


def _attention(settings: Mapping[str, Any]) -> list[Any]:
    """Return all attention implementations named in a configuration, also in nested ones."""
    found = [value for key, value in settings.items() if key.endswith("attn_implementation")]
    return [*found, *(_attention(value) for value in settings.values() if isinstance(value, dict))]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
