"""Errors that a user can act on; each says what was required, what was given and what to do.

    AdaptiveLoraError            exit code 2 on the command line
    ├── ConfigError              study files, command-line options, method specifications
    ├── DataError                data files, columns, templates, examples
    ├── ModelError               base models: not found, changed, without adaptable sites
    ├── AllocationError          ranks and budgets that cannot be met
    ├── AdapterError             adapter folders and models that differ from their plan
    ├── TrackingError            tracking server and registry
    │   ├── Undelivered          results wait on local disk for it; exit code 3
    │   └── ClaimLost            another process took over; caught where trials are run
    └── TrialFailed              a trial that the stability guard ended; the study goes on

Anything else that escapes is a bug of this package and keeps its traceback; what transformers, PEFT
and torch raise over a model becomes a ModelError (`model_errors`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from adaptive_lora.redaction import hide_credentials, printable

_BRIEF = 600
"""Most signs that are quoted of an error from elsewhere."""


class AdaptiveLoraError(Exception):
    """Base of all errors that are the user's to mend.

    Messages quote what was given, other libraries' errors included: credentials are left out here,
    and signs that would act on a terminal become escapes.
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
    """This process seemed dead for so long that another one took its trial."""


class TrialFailed(AdaptiveLoraError, RuntimeError):
    """Training became non-finite too often; carries the reason shown in the comparison."""


def brief(error: BaseException) -> str:
    """Return what another library says, on one line and no longer than people read."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, LookupError):  # says what was looked for, and nothing else
        text = f"{kind}: {text}"
    text = text or kind
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]} ..."


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """Return "unknown KIND 'x'; did you mean 'y'? Known: ..." for an error message."""
    names = sorted(known)
    near = difflib.get_close_matches(given[:100], names, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{given:.100}'{hint} Known: {', '.join(names)}"
