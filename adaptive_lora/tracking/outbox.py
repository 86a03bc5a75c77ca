"""The outbox: records are kept on local disk and sent in the background, so that training never waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptive_lora.tracking.journal import Journal, new_key
from adaptive_lora.tracking.retries import STORE_ERRORS, Backoff, passes, reason_of
from adaptive_lora.tracking.uploader import Uploader

log = logging.getLogger(__name__)

FOLDER = "spool"
"""Name of the outbox folder inside a study's output folder."""
_LAST_REQUEST = 5.0
"""Seconds for which the end of a process waits for a request in progress."""
_WORTH_SAYING = 5
"""Number of consecutive failures, at least 2 s, after which the user is told."""
_DOUBTFUL = 8
"""Number of repetitions after MLflow's BAD_REQUEST, which both an unreachable database and an invalid
record give."""


class Outbox:
    """The journals of a process and the thread that sends them, run by run, in order."""

    def __init__(self, folder: Path, uploader: Uploader) -> None:
        self.folder, self.uploader = folder, uploader
        self._journals: list[Journal] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._backoff = Backoff()
        self._bug: BaseException | None = None
        self.away = ""
        """Reason why the store is unreachable; empty if it is reachable."""
        self._told = False
        self._arrivals = 0
        self._refused: set[str] = set()

    def create(self, header: Mapping[str, Any]) -> Journal:
        """Create a journal for a run.

        Raises:
            TrackingError: the folder cannot be written.
        """
        journal = Journal.create(self.folder, new_key(), header)
        with self._changed:
            self._journals.append(journal)
        self.notify()
        return journal

    def notify(self) -> None:
        """Start sending pending records in the background.

        Raises:
            Exception: a bug that ended the sender.
        """
        if self._bug is not None:
            raise self._bug
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, patience: float, journal: Journal | None = None) -> bool:
        """Wait until everything has arrived; return whether it has.

        Args:
            patience: seconds without any progress after which to give up.
            journal: journal to wait for; None: all.
        """
        self.notify()
        with self._changed:
            seen, since = self._arrivals, time.monotonic()
            while self._bug is None and any(j.pending for j in self._watched(journal)):
                left = since + patience - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 1.0))
                if self._arrivals != seen:
                    seen, since = self._arrivals, time.monotonic()
            if self._bug is not None:
                raise self._bug
            return not any(j.undelivered for j in self._watched(journal))

    def _watched(self, journal: Journal | None) -> list[Journal]:
        return self._journals if journal is None else [journal]

    def undelivered(self) -> list[Journal]:
        """Return the journals with undelivered records."""
        with self._changed:
            return [journal for journal in self._journals if journal.undelivered]

    def holds(self, folder: Path) -> bool:
        """Return whether a journal belongs to this process, which sends it itself."""
        with self._changed:
            return any(journal.folder == folder for journal in self._journals)

    def retry_refused(self) -> None:
        """Try refused records again."""
        with self._changed:
            for journal in self._journals:
                journal.retry()

    def close(self) -> None:
        """Stop the sender and release all journals; undelivered ones stay on disk."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout=_LAST_REQUEST)
            if thread.is_alive():  # a server hangs; the journals stay locked until this process ends
                return
        with self._changed:
            journals, self._journals = self._journals, []
        for journal in journals:
            if journal.undelivered:
                journal.release()
            else:
                journal.remove()
        with suppress(OSError):  # other processes may use it
            self.folder.rmdir()

    def _work(self) -> None:
        try:
            while self._thread is threading.current_thread():
                with self._changed:
                    journal = next((journal for journal in self._journals if journal.pending), None)
                if journal is None:
                    self._tidy()
                else:
                    self._send(journal)
        except BaseException as bug:  # raised on the main thread, by `notify` or `drain`
            self._bug = bug
            with self._changed:
                self._changed.notify_all()

    def _tidy(self) -> None:
        """Wait for records to send; flush records to disk; delete delivered journals."""
        with self._changed:
            self._changed.wait(1.0)
            done = [j for j in self._journals if j.finished and not j.undelivered]
        self._drop(done)
        for journal in list(self._watched(None)):
            journal.settle()

    def _drop(self, done: Sequence[Journal]) -> None:
        """Delete delivered journals."""
        with self._changed:
            self._journals = [journal for journal in self._journals if journal not in done]
        for journal in done:
            journal.remove()

    def _send(self, journal: Journal) -> None:
        before = len(journal.done)
        try:
            journal.settle()
            self.uploader.next(journal)
        except STORE_ERRORS as error:
            if len(journal.done) > before:
                self._arrived()
            self._failed(journal, error)
            return
        if journal.finished and not journal.undelivered:
            self._drop([journal])
        if self._told:
            log.warning("The tracking store is back; what was kept is being delivered.")
        self.away, self._told = "", False
        self._arrived()

    def _arrived(self) -> None:
        """Count a record, or a part of one, that has arrived."""
        self._backoff.reset()
        with self._changed:
            self._arrivals += 1
            self._changed.notify_all()

    def _failed(self, journal: Journal, error: BaseException) -> None:
        """Wait before the next attempt, or leave the journal where the store refuses it."""
        wait, reason = self._backoff.next(), reason_of(error)
        doubtful = getattr(error, "error_code", "") == "BAD_REQUEST"
        if not passes(error) or (doubtful and self._backoff.failures > _DOUBTFUL):
            journal.learn(refused=reason)
            self._backoff.reset()
            if journal.key not in self._refused:  # the user is told once
                self._refused.add(journal.key)
                log.warning(
                    "The tracking store refuses run %s: %s. Its records stay in %s.",
                    journal.facts.get("run_id", journal.key), reason, journal.folder,
                )  # fmt: skip
            with self._changed:
                self._changed.notify_all()
            return
        self.away = reason
        if self._backoff.failures == _WORTH_SAYING:
            self._told = True
            log.warning(
                "The tracking store does not answer (%s). Training continues; records are kept in %s.",
                reason, self.folder,
            )  # fmt: skip
        with self._changed:
            this = threading.current_thread()
            self._changed.wait_for(lambda: self._thread is not this, wait)
