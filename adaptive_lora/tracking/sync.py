"""Delivery of journals left by dead processes; records are read back before journals are deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from adaptive_lora.config import TrackingConfig
from adaptive_lora.config.store_place import store_uri
from adaptive_lora.redaction import HIDDEN, hide_credentials
from adaptive_lora.tracking.connection import reach
from adaptive_lora.tracking.journal import CorruptJournal, Journal, header_of, journals, sweep
from adaptive_lora.tracking.outbox import FOLDER
from adaptive_lora.tracking.retries import STORE_ERRORS, outlast, passes, reason_of
from adaptive_lora.tracking.runs import SIGNATURE, STUDY_ID
from adaptive_lora.tracking.uploader import RUN_KEY, Uploader

_PATIENCE = 30.0
"""Seconds for which one record is retried while a store does not answer."""
Point = tuple[str, int]
"""A metric at a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Synced:
    """Outcome of the delivery of one journal."""

    folder: Path
    run_id: str = ""
    """Id of the run; empty if the store has not assigned one yet."""
    metrics: int = 0
    """Number of points (metric, step) in the journal."""
    found: int = 0
    """Number of points read back from the store."""
    left: str = ""
    """Reason why the journal is kept; empty if everything arrived."""
    held: bool = False
    """Mark of a journal that is kept because its process is alive and sends it itself."""
    waiting: bool = False
    """Mark of a journal that is kept because the store did not answer."""


def sync_folder(config: TrackingConfig) -> Iterator[Synced]:
    """Deliver the journals of ended processes in an output folder, each to its own store.

    Journals contain no passwords: if a store needs one, it is read from `MLFLOW_TRACKING_USERNAME` and
    `MLFLOW_TRACKING_PASSWORD`, or from a given URI.

    Raises:
        TrackingError: a store is unreachable.
    """
    outbox = Path(config.output).absolute() / FOLDER
    given = store_uri(config)
    headers = [header_of(folder) for folder in journals(outbox)]
    for shown in sorted({str(header["store"]) for header in headers if "store" in header}):
        same = hide_credentials(given) == shown
        uri = given if same or config.tracking_uri else shown.replace(f"{HIDDEN}@", "")
        yield from deliver_left(outbox, reach(uri), shown)


def deliver_left(outbox: Path, uploader: Uploader, shown_uri: str) -> Iterator[Synced]:
    """Deliver the journals of ended processes, not those of living ones.

    May be interrupted and repeated at any point. A run whose process ended without a status becomes
    KILLED, unless another process has finished it since; points that the run has received meanwhile
    from a process that continued it are not sent again.

    Args:
        outbox: folder of journals.
        uploader: uploader to the store.
        shown_uri: URI of the store; journals of other stores are skipped.
    """
    sweep(outbox)
    for folder in journals(outbox):
        try:
            journal = Journal.take(folder)
        except FileNotFoundError:
            continue  # another process has just delivered and removed it
        except CorruptJournal as error:
            yield Synced(folder=folder, left=str(error))
            continue
        if journal is None:
            yield Synced(folder=folder, left="its process is running and sends it itself", held=True)
        elif (store := journal.header.get("store", shown_uri)) != shown_uri:
            journal.release()
            yield Synced(folder=folder, left=f"it belongs to {store}")
        else:
            yield _deliver(journal, uploader)


def belongs(folder: Path, run: Run) -> bool:
    """Return whether a journal, which another process may lock or remove, belongs to a run."""
    header = header_of(folder)
    own = {run.info.run_id, run.data.tags.get(RUN_KEY)} - {None}
    return not own.isdisjoint({header.get("run_id"), header.get("key")})


def _deliver(journal: Journal, uploader: Uploader) -> Synced:
    """Deliver one journal, read it back, and delete it if nothing is missing."""
    journal.retry()
    sent, found, left, waiting = set[Point](), set[Point](), "", False
    try:
        sent = set(_points(journal))
        if not _superseded(journal, uploader.client):
            _send(journal, uploader)
            found = _in_store(journal, uploader.client) & sent
            if found != sent:
                left = f"{len(sent - found)} of {len(sent)} points were not found in the store"
    except STORE_ERRORS as error:
        left, waiting = reason_of(error), passes(error)
    if left:
        journal.release()
    else:
        journal.remove()
    run_id = journal.facts.get("run_id", "")
    return Synced(folder=journal.folder, run_id=run_id, metrics=len(sent), found=len(found), left=left, waiting=waiting)


def _superseded(journal: Journal, client: MlflowClient) -> bool:
    """Return whether a journal is not needed, because another process has finished its run or trial.

    Measurements of a run that never reached the store are not dropped: they are delivered as a separate run.
    """
    new = journal.header
    if not new:
        return True  # its process ended before the first line was complete
    if not new.get("once"):
        return False
    if "run_id" in journal.facts:
        run = outlast(lambda: client.get_run(journal.facts["run_id"]), _PATIENCE)
        return journal.pending and str(run.info.status) == "FINISHED"
    tags = new.get("tags", {})
    if SIGNATURE not in tags or any(_points(journal)):
        return False
    query = f"tags.{STUDY_ID} = '{tags.get(STUDY_ID)}' and tags.{SIGNATURE} = '{tags[SIGNATURE]}'"
    runs = outlast(lambda: client.search_runs([new["experiment_id"]], query), _PATIENCE)
    return bool(runs) and new["key"] not in {run.data.tags.get(RUN_KEY) for run in runs}


def _send(journal: Journal, uploader: Uploader) -> None:
    """Send a journal's records; the run of a process that ended without a status becomes KILLED."""
    if journal.header.get("once") and "run_id" in journal.facts and journal.pending:
        journal.known = _in_store(journal, uploader.client)
    while journal.pending:
        outlast(lambda: uploader.next(journal), _PATIENCE)
    status = [r.values["status"] for r in journal.records(0) if r.op == "status"]
    if not journal.header.get("ends") or (status and status[-1] != "RUNNING"):
        return
    run_id, client = journal.facts["run_id"], uploader.client
    if outlast(lambda: client.get_run(run_id), _PATIENCE).info.status == "RUNNING":
        outlast(lambda: client.set_terminated(run_id, "KILLED"), _PATIENCE)


def _points(journal: Journal) -> Iterator[Point]:
    """Yield the points in a journal."""
    return ((record.values["k"], record.values["s"]) for record in journal.records(0) if record.op == "metric")


def _in_store(journal: Journal, client: MlflowClient) -> set[Point]:
    """Return the points of a journal's metrics that the store has."""
    found: set[Point] = set()
    for name in {name for name, _ in _points(journal)}:
        ask = partial(client.get_metric_history, journal.facts["run_id"], name)
        found |= {(name, point.step) for point in outlast(ask, _PATIENCE)}
    return found
