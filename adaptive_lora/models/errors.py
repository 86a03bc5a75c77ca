"""Errors of the libraries that build and run models: one line for the user, the traceback in a file.

transformers, PEFT, torch and bitsandbytes can raise any error for a model, a setting or a corrupt
file. Errors in this package's own code are recognised and keep their traceback.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from adaptive_lora.errors import AdaptiveLoraError, ModelError, brief
from adaptive_lora.redaction import hide_credentials, printable

_LIBRARIES = ("accelerate", "bitsandbytes", "huggingface_hub", "peft", "safetensors", "tokenizers",
              "transformers", "torch.autograd", "torch.nn.modules", "torch._tensor")  # fmt: skip
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
"""Exception types that indicate a bug, because code does not raise them on purpose."""


@contextmanager
def model_errors(what: str, model: Any = None) -> Iterator[None]:
    """Convert libraries' exceptions inside the block into a ModelError of one line that names the module.

    Args:
        what: description of the failure, such as `uniform-r8 cannot be attached to GPT2LMHeadModel`.
        model: model whose modules can be named, or None.

    Raises:
        ModelError: a library raised an exception; other exceptions pass unchanged.
    """
    try:
        yield
    except (AdaptiveLoraError, MemoryError):
        raise
    except Exception as error:
        if not of_a_library(error):
            raise
        place = _place(error, model)
        where = f" at {place}" if place else ""
        raise ModelError(f"{what}: {type(error).__name__}{where}: {brief(error)}") from error


def of_a_library(error: BaseException) -> bool:
    """Return whether an error was raised in a library's code rather than in this package's."""
    for frame in reversed(_frames(error)):
        module = str(frame.f_globals.get("__name__", ""))
        if _within(module, "adaptive_lora"):
            return False
        if any(_within(module, library) for library in _LIBRARIES):
            return True
    return False


def is_bug(error: BaseException) -> bool:
    """Return whether an error is a bug of this package, not caused by files or libraries."""
    return isinstance(error, _BUGS) and not of_a_library(error)


def write_traceback(error: BaseException, folder: Path) -> Path | None:
    """Write the traceback of a library's exception, without secrets; return the file, or None.

    Args:
        error: error shown to the user; its cause is written.
        folder: folder for the file, inside the output folder; if that does not exist or cannot be
            written to, the system's temporary folder is used.
    """
    cause = error.__cause__
    if cause is None or not of_a_library(cause):
        return None
    text = printable(hide_credentials("".join(traceback.format_exception(error))))
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for place in (folder, Path(tempfile.gettempdir())):
        try:
            place.mkdir(exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return place / name
    return None


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _frames(error: BaseException) -> list[FrameType]:
    """Return the frames from where an error was caught to where it was raised."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _place(error: BaseException, model: Any) -> str | None:
    """Return the innermost module that was running, or the one that PEFT was about to adapt."""
    names: dict[int, str] = {}
    if model is not None:
        names = {id(module): name for name, module in model.named_modules()}
    for frame in reversed(_frames(error)):
        running = names.get(id(frame.f_locals.get("self")))
        if running:
            return running
        if _within(str(frame.f_globals.get("__name__", "")), "peft"):
            target = frame.f_locals.get("current_key") or frame.f_locals.get("key")
            if isinstance(target, str):
                return target
    return None
