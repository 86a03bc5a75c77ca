"""Creation and upgrade of SQLite stores, atomically.

MLflow creates its tables in some seventy committed steps. A process that is stopped between two of
them, or two concurrent processes, would leave a file that no command can use.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from enum import StrEnum
from functools import cache
from glob import escape
from pathlib import Path

import psutil
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from filelock import FileLock
from mlflow.store.db import utils as schema
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH as ARTIFACTS
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.exc import SQLAlchemyError

from adaptive_lora.config.store_place import open_database, sqlite_file, sqlite_uri, unusable
from adaptive_lora.errors import TrackingError, brief
from adaptive_lora.interruption import remove_partial, replacing
from adaptive_lora.redaction import hide_credentials

log = logging.getLogger(__name__)

DATABASE_ERRORS = (SQLAlchemyError, CommandError, sqlite3.Error)
"""Exceptions of creating, reading and upgrading tables, in addition to MLflow's own errors."""
_TEMPORARY = "_alembic_tmp_"
"""Prefix of the names of tables that are being rewritten."""
_OTHERS_SECONDS = 60.0
"""Seconds to wait for another program that is creating the tables."""


class State(StrEnum):
    """State of a store's file."""

    ABSENT = "absent"
    """No file, or one without tables."""
    WHOLE = "whole"
    """All tables of this MLflow's version."""
    HALF = "half made"
    """Some of MLflow's tables, and nothing in them."""
    OLD = "older"
    """Runs in tables of an earlier version, or of an upgrade that was interrupted."""
    NEWER = "newer"
    """Tables of a later version of MLflow than the one installed."""


_FIXES = {
    State.OLD: "an earlier version of MLflow, or its upgrade was interrupted. `adaptive-lora upgrade-store` makes "
    "a backup beside it and upgrades it; until then it stays as it is.",
    State.NEWER: "a later version of MLflow; install that version (`pip install -U mlflow`), or choose another store "
    "with --tracking-uri.",
}
"""State of a store that this MLflow does not open -> the version that made it, and what to do."""


def ensure_store(uri: str) -> None:
    """Create a SQLite store if it is missing; other kinds of stores are left to MLflow.

    An incomplete one, left by an interrupted command of an earlier version, is renamed.

    Raises:
        TrackingError: it cannot be created, or its tables are of another version of MLflow.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    file = Path(os.path.realpath(file))
    if state_of(uri) is State.WHOLE and not _lock_of(file).exists():
        return
    try:
        with _alone(file):
            state = _settled(uri, file)
            if state is State.HALF:
                _set_aside(file)
            if state in (State.HALF, State.ABSENT):
                _make(file)
            require_current(uri)
    except (OSError, *DATABASE_ERRORS) as error:
        raise unusable(uri, f"it cannot be made ({brief(error)})") from error


def require_current(uri: str) -> None:
    """Check that the tables of a SQLite store, if it has any, are of this version of MLflow.

    Raises:
        TrackingError: they are older or newer; the message gives the fix.
    """
    if fix := _FIXES.get(state_of(uri)):
        raise TrackingError(f"tracking store {hide_credentials(uri)} was made by {fix}")


def state_of(uri: str) -> State:
    """Return the state of a SQLite store's file.

    Raises:
        TrackingError: it has another program's tables, or is corrupt.
    """
    file = sqlite_file(uri)
    assert file is not None
    if not file.is_file() or not file.stat().st_size:
        return State.ABSENT
    try:
        with closing(open_database(file)) as database:
            return _state(database, uri)
    except sqlite3.Error as error:
        raise unusable(uri, f"its tables cannot be read ({error})") from error


def _state(database: sqlite3.Connection, uri: str) -> State:
    database.execute("PRAGMA busy_timeout = 20000")
    listed = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    tables = {name for (name,) in listed if not name.startswith("sqlite_")}
    if not tables:
        return State.ABSENT
    if not tables & {"experiments", "alembic_version"}:
        raise unusable(uri, f"it holds another program's tables ({', '.join(sorted(tables)[:5])})")
    version = ""
    if "alembic_version" in tables:
        version = next((v for (v,) in database.execute("SELECT * FROM alembic_version")), "")
    if version == _revisions()[0]:
        return State.WHOLE
    if version and version not in _revisions():
        return State.NEWER
    rows = {"runs": "true", "registered_models": "true", "experiments": "experiment_id <> 0"}
    queries = [f"SELECT 1 FROM {table} WHERE {ours} LIMIT 1" for table, ours in rows.items() if table in tables]
    return State.OLD if any(database.execute(query).fetchone() for query in queries) else State.HALF


@cache
def _revisions() -> tuple[str, ...]:
    """Return the table versions known to the installed MLflow, the latest first."""
    script = ScriptDirectory.from_config(schema._get_alembic_config(""))
    return tuple(found.revision for found in script.walk_revisions())


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Lock the creation and upgrade of this store inside the block; remove files left by dead processes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(file), thread_local=False):
        remove_partial(file.parent, file.name)
        yield
        # Released only now, with the store in place, so that waiting processes find it.
        _lock_of(file).unlink(missing_ok=True)


def _lock_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")


def _settled(uri: str, file: Path) -> State:
    """Return a store's state after other programs, such as `mlflow ui`, have finished creating it."""
    until = time.monotonic() + _OTHERS_SECONDS
    while (state := state_of(uri)) is State.HALF and (others := _users_of(file)):
        if time.monotonic() > until:
            raise unusable(uri, f"it is half made, and open in process {others}")
        time.sleep(0.2)
    return state


def _users_of(file: Path) -> str:
    """Return the numbers of this machine's other processes that have a file open, as far as visible."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(one.path == str(file) for one in process.open_files()):
                found.append(str(process.pid))
    return ", ".join(found)


def _set_aside(file: Path) -> None:
    """Rename an incomplete store, with a warning."""
    aside = _free(file, "half-made")
    os.replace(file, aside)
    journal = file.with_name(f"{file.name}-journal")
    if journal.exists():
        os.replace(journal, aside.with_name(f"{aside.name}-journal"))
    log.warning(
        "The tracking store %s was left half made by an interrupted command and holds no run. "
        "It is set aside as %s, and a new one is made.", file, aside.name,
    )  # fmt: skip


def _free(file: Path, what: str) -> Path:
    """Return a free name in a file's folder."""
    name = f"{file.name}.{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = sum(one.name.startswith(name) for one in file.parent.iterdir())
    return file.with_name(f"{name}-{taken}" if taken else name)


def artifact_root() -> str | None:
    """Return the URI of this folder's artifacts, or None if MLflow's own relative path works.

    MLflow decodes `%20` in a plain path, and writes quotes and colons into SQL unescaped.
    """
    if not re.search(r"[%?:'\"\\]", str(Path.cwd())):
        return None
    return (Path.cwd() / ARTIFACTS).as_uri()


def _make(file: Path) -> None:
    """Create a store with all its tables and the default experiment."""
    with replacing(file) as draft:
        draft.touch()  # where this fails, MLflow would retry for minutes
        store = SqlAlchemyStore(sqlite_uri(draft), artifact_root() or ARTIFACTS)
        store._dispose_engine()
        SqlAlchemyStore._engine_map.pop(sqlite_uri(draft), None)


def upgrade(uri: str) -> Path | None:
    """Upgrade a SQLite store to the installed MLflow's tables, keeping a backup.

    The store is copied, the copy is upgraded and checked, and then renamed to the store's name, so
    that at every moment there is a complete store, the old or the new one.

    Returns:
        The path of the backup, or None if no upgrade was needed.

    Raises:
        TrackingError: the store is missing, of another kind, in use, or cannot be upgraded.
    """
    file = sqlite_file(uri)
    if file is None:
        raise TrackingError(
            f"{hide_credentials(uri)} is no SQLite store: make a backup of its database, and run "
            "`mlflow db upgrade` where its server runs."
        )
    if state_of(uri) is State.ABSENT:
        raise TrackingError(f"there is no tracking store {file}; set --tracking-uri.")
    file = Path(os.path.realpath(file))
    with _alone(file):
        state = state_of(uri)
        if state is not State.OLD:
            require_current(uri)
            return None
        if others := _users_of(file):
            raise TrackingError(
                f"tracking store {file} is open in process {others}; end it before the "
                "upgrade, so that nothing is recorded meanwhile."
            )
        try:
            return _upgraded(file)
        except (OSError, *DATABASE_ERRORS) as error:
            raise TrackingError(
                f"tracking store {file} cannot be upgraded ({brief(error)}); it is as it was. If "
                "an earlier `mlflow db upgrade` was interrupted, put the backup from before it in "
                "its place."
            ) from error


def _upgraded(file: Path) -> Path:
    with closing(sqlite3.connect(file, isolation_level=None)) as old, replacing(file) as draft:
        # WAL mode is left, because its extra file would be read as part of the new store.
        old.execute("PRAGMA journal_mode = DELETE")
        old.execute("BEGIN IMMEDIATE")  # no other process can write from here on
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(draft, isolation_level=None)) as copy:
            source.backup(copy)  # a connection with the lock cannot itself be copied
            _clear_temporary(copy)
        engine = schema.create_sqlalchemy_engine(sqlite_uri(draft))
        schema._upgrade_db(engine)
        engine.dispose()
        with closing(sqlite3.connect(draft)) as copy:
            (verdict,) = copy.execute("PRAGMA integrity_check").fetchone()
            count = "SELECT count(*) FROM runs"
            if verdict != "ok" or copy.execute(count).fetchone() != old.execute(count).fetchone():
                raise sqlite3.DatabaseError(f"the upgraded copy is not right: {verdict:.200}")
        return _backed_up(file)


def _backed_up(file: Path) -> Path:
    """Link a store to a backup name, or find the link of an interrupted upgrade."""
    for other in file.parent.glob(f"{escape(file.name)}.backup-*"):
        if other.samefile(file):
            return other
    backup = _free(file, "backup")
    try:
        os.link(file, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(file, backup)
    return backup


def _clear_temporary(database: sqlite3.Connection) -> None:
    """Remove temporary tables of an interrupted rewriting."""
    listed = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in listed:
        if name.startswith(_TEMPORARY) and (name.removeprefix(_TEMPORARY),) in listed:
            database.execute(f'DROP TABLE "{name}"')
