"""Errors that a user can act on; each says what was required, what was given and what to do.

    AdaptiveLoraError            exit code 2 on the command line
    ├── ConfigError              study files, command-line options, method specifications
    ├── DataError                data files, columns, templates, examples
    ├── ModelError               base models: not found, changed, without adaptable sites
    ├── AllocationError          ranks and budgets that cannot be met
    ├── AdapterError             adapter folders and models that differ from their plan
    ├── TrackingError            tracking server and registry
    │   ├── Undelivered          results are kept on local disk until delivered; exit code 3
    │   └── LeaseLost            another process took over the trial; caught where trials are run
    └── TrialFailed              a trial that the stability guard ended; the study continues

Anything else that escapes is a bug of this package and keeps its traceback; what transformers, PEFT
and torch raise over a model becomes a ModelError (`model_errors`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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


class DataError(AdaptiveLoraError, ValueError):
    """The data cannot be read or leaves nothing to train on."""


class ModelError(AdaptiveLoraError, ValueError):
    """The base model cannot be used."""


class AllocationError(AdaptiveLoraError, ValueError):
    """No rank plan satisfies what was asked for."""


class AdapterError(AdaptiveLoraError, RuntimeError):
    """An adapter differs from the plan or from what was saved."""


class TrackingError(AdaptiveLoraError, RuntimeError):
    """The tracking server or registry cannot be used."""


class Undelivered(TrackingError):
    """Results are kept on local disk, because the tracking server did not take them."""

    exit_code = 3


class LeaseLost(TrackingError):
    """Another process took this trial over, because its lease had expired."""


class TrialFailed(AdaptiveLoraError, RuntimeError):
    """Training became non-finite too often; carries the reason shown in the comparison."""


def brief(error: BaseException) -> str:
    """Return another library's error message on one line, cut to `_BRIEF` characters."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, LookupError):  # its message is the missing key alone
        text = f"{kind}: {text}"
    text = text or kind
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]} ..."


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """Return "unknown KIND 'x'; did you mean 'y'? Known: ..." for an error message."""
    names = sorted(known)
    near = difflib.get_close_matches(given[:100], names, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{given:.100}'{hint} Known: {', '.join(names)}"
