"""Retries: the temporary errors of a tracking store, and waiting times.

MLflow's own retries are switched off (`connect`): they repeat calls such as "create a run" after a
connection broke, although the server may have executed the call, which leaves two runs. Here only
repeatable calls are retried.
"""

from __future__ import annotations

import errno
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from adaptive_lora.errors import TrackingError
from adaptive_lora.redaction import hide_credentials

T = TypeVar("T")

STORE_ERRORS = (MlflowException, OSError, ValueError)
"""Exceptions of calls to a store; ValueError if the body of an answer was cut off."""
_LASTING = {
    "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "INVALID_PARAMETER_VALUE", "INVALID_STATE",
    "NOT_IMPLEMENTED", "PERMISSION_DENIED", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED",
}  # fmt: skip
"""MLflow's codes of errors that the same call would meet again. BAD_REQUEST is none of them: MLflow also gives it
if its database is unreachable or has no free connection."""
_PASSING_STATUS = {408, 425, 429}
PATIENCE = 120.0
"""Seconds for which a call on the main thread is retried during an outage."""


def passes(error: BaseException) -> bool:
    """Return whether the same call may succeed later, because the server is unreachable, busy or out of disk."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return status in _PASSING_STATUS or status >= 500
    if isinstance(error, MlflowException):
        return error.error_code not in _LASTING
    if isinstance(error, (requests.RequestException, json.JSONDecodeError)):
        return True
    return isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)


def reason_of(error: BaseException) -> str:
    """Return an error's first line without credentials, for display."""
    lines = hide_credentials(str(error)).splitlines()
    return next(iter(lines), type(error).__name__)[:300].rstrip(". ")


class Backoff:
    """Waiting times that double from `first` to `longest` seconds, each shortened by up to half.

    The jitter keeps several writers from returning to a restarted server in the same instant.
    """

    def __init__(self, first: float = 0.25, longest: float = 10.0) -> None:
        self._first, self._longest = first, longest
        self._random = random.Random()
        self.failures = 0

    def next(self) -> float:
        """Return how many seconds to wait after one more failure."""
        whole = min(self._longest, self._first * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return whole * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Restart from `first` after a success."""
        self.failures = 0


def outlast(call: Callable[[], T], patience: float = PATIENCE) -> T:
    """Repeat a call until it succeeds, fails for good, or `patience` seconds are over; then raise its last error."""
    end, backoff = time.monotonic() + patience, Backoff()
    while True:
        try:
            return call()
        except STORE_ERRORS as error:
            wait = backoff.next()
            if not passes(error) or time.monotonic() + wait > end:
                raise
            time.sleep(wait)


def outlast_or_say(call: Callable[[], T], patience: float = PATIENCE) -> T:
    """Retry like `outlast`, with a clear error if the store stays unreachable.

    Raises:
        TrackingError: the store did not answer in that time.
        MlflowException, OSError, ValueError: a permanent error.
    """
    try:
        return outlast(call, patience)
    except STORE_ERRORS as error:
        if not passes(error):
            raise
        raise TrackingError(
            f"the tracking store did not answer for {patience:.0f} s: {reason_of(error)}. "
            "What was trained is kept; run the same command again when it is back."
        ) from None  # the cause may hold the password


@contextmanager
def suppress_existing() -> Iterator[None]:
    """Ignore errors of existing objects inside the block, made by another process or an earlier request."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


class PatientClient:
    """An MlflowClient whose calls are retried for up to `PATIENCE` seconds.

    Calls that create objects (`create_...`) are made once, because a repeated one could create two.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        """Return the client's attribute; calls of a repeatable method are retried."""
        found = getattr(self._client, name)
        if name.startswith(("_", "create_")) or not callable(found):
            return found
        return lambda *args, **kwargs: outlast_or_say(lambda: found(*args, **kwargs))
