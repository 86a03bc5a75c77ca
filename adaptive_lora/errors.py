"""Errors that a user can act on; each says what was required, what was given and what to do.

    AdaptiveLoraError            exit code 2 on the command line
    ├── ConfigError              study files, command-line options, method specifications
    │   └── MissingExtra         packages of an extra of this one that are not installed
    ├── DataError                data files, columns, templates, examples
    ├── ModelError               base models: not found, changed, without adaptable sites
    ├── AllocationError          ranks and budgets that cannot be met
    ├── AdapterError             adapter folders and models that differ from their plan
    ├── HubError                 the Hugging Face hub: not reached, no permission, nothing or other files taken
    ├── TrackingError            tracking server and registry
    │   ├── Undelivered          results are kept on local disk until delivered; exit code 3
    │   ├── StudyInUse           another command runs the study
    │   └── LeaseLost            another command took the study over, because this one seemed dead
    ├── WorkerError              worker processes that cannot work for a study; it continues with the same command
    ├── ProcessLost              one of the processes that train a trial together; the same command continues
    └── TrialFailed              a trial that the stability guard ended; the study continues

Anything else that escapes is a bug of this package and keeps its traceback; what transformers, PEFT
and torch raise over a model becomes a ModelError (`model_errors`).
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from adaptive_lora.redaction import hide_credentials, printable

_BRIEF = 600
"""Maximum number of characters quoted of another library's error."""


class AdaptiveLoraError(Exception):
    """Base of all errors that the user can fix.

    Messages quote input and other libraries' errors: credentials are removed here, and control
    characters are escaped.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(hide_credentials(message)))


class ConfigError(AdaptiveLoraError, ValueError):
    """A study file, option or method specification is wrong."""


class MissingExtra(ConfigError):
    """Packages of an extra of this one are not installed; the message has the command that installs them."""

    def __init__(self, what: str, extra: str, lacking: Iterable[str]) -> None:
        """Name what needs the extra, and the modules that are lacking."""
        names = list(lacking)
        listed = f"{', '.join(names[:2])} and {len(names) - 2} more packages" if len(names) > 3 else ", ".join(names)
        verb = "is" if len(names) == 1 else "are"
        super().__init__(f'{what} needs {listed}, which {verb} not installed: pip install "adaptive-lora[{extra}]"')


class DataError(AdaptiveLoraError, ValueError):
    """The data cannot be read or leaves nothing to train on."""


class ModelError(AdaptiveLoraError, ValueError):
    """The base model cannot be used."""


class AllocationError(AdaptiveLoraError, ValueError):
    """No rank plan satisfies what was asked for."""


class AdapterError(AdaptiveLoraError, RuntimeError):
    """An adapter differs from the plan or from what was saved."""


class HubError(AdaptiveLoraError, RuntimeError):
    """The Hugging Face hub does not take what is pushed."""


class TrackingError(AdaptiveLoraError, RuntimeError):
    """The tracking server or registry cannot be used."""


class Undelivered(TrackingError):
    """Results are kept on local disk, because the tracking server did not take them."""

    exit_code = 3


class StudyInUse(TrackingError):
    """Another command runs this study; the message has its process, its machine and the time it began."""


class LeaseLost(TrackingError):
    """Another command took this study over, because its lease had expired."""


class WorkerError(AdaptiveLoraError, RuntimeError):
    """A worker process cannot work for the study: other versions or files, no resources, or it ends too often."""


class ProcessLost(AdaptiveLoraError, OSError):
    """One of the processes that train a trial together has ended or differs from the others."""


class TrialFailed(AdaptiveLoraError, RuntimeError):
    """Training became non-finite too often; carries the reason shown in the comparison."""


def brief(error: BaseException) -> str:
    """Return another library's error message on one line, cut to `_BRIEF` characters."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, LookupError):  # its message is the missing key alone
        text = f"{kind}: {text}"
    text = text or kind
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]} ..."


def unknown_name(kind: str, given: object, known: Iterable[str]) -> str:
    """Return "unknown KIND 'x'; did you mean 'y'? Known: ..." for an error message."""
    names = sorted(known)
    near = nearest_name(given, names)
    hint = f"; did you mean '{near}'?" if near else "."
    return f"unknown {kind} '{given!s:.100}'{hint} Known: {', '.join(names)}"


def nearest_name(given: object, known: Iterable[str]) -> str | None:
    """Return the known name that is most like the given one, whatever their case; None if none is like it."""
    names = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(str(given)[:100].casefold(), names, n=1)
    return names[near[0]] if near else None


EXTRAS = {
    "study": (
        "mlflow",
        "datasets",
        "matplotlib",
        "pyarrow",
        "sklearn",
        "sacrebleu",
        "rouge_score",
        "seqeval",
        "PIL",
        "alembic",
        "sqlalchemy",
        "requests",
    ),
    "qlora": ("bitsandbytes",),
    "gguf": ("gguf",),
    "ray": ("ray",),
    "audio": ("soundfile", "jiwer"),
}
"""Extra of this package -> modules of the packages that it adds."""


def installed(module: str) -> bool:
    """Return whether a module of another package is installed, without importing it; it may be broken."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a specification, or None in its place
        return False


def require_extra(extra: str, what: str) -> None:
    """Check that the packages of an extra are installed; none is imported.

    Args:
        extra: key of `EXTRAS`.
        what: what needs them, for the message.

    Raises:
        MissingExtra: some are not.
    """
    lacking = [module for module in EXTRAS[extra] if not installed(module)]
    if lacking:
        raise MissingExtra(what, extra, lacking)


@contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Name the extra where the block imports a package that only an extra adds, and which is not installed.

    Raises:
        MissingExtra: in place of the import's error; that of an installed, broken package is left as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, modules in EXTRAS.items():
            if error.name in modules and not installed(error.name):
                raise MissingExtra(what, extra, [error.name]) from error
        raise
