"""A SQLite store is there whole or not at all: made and upgraded under another name, then renamed.

MLflow makes its tables in some seventy steps, each of which it commits. A process that is ended
between two of them, or two processes at it at once, would leave a file that no command can use.
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
from adaptive_lora.redaction import hide_credentials

log = logging.getLogger(__name__)

DATABASE_ERRORS = (SQLAlchemyError, CommandError, sqlite3.Error)
"""What making tables, reading or upgrading them may raise beside MLflow's own errors."""
_MAKING = ".making-"
_TEMPORARY = "_alembic_tmp_"
"""How names of tables begin that are being rewritten."""
_OTHERS_SECONDS = 60.0
"""Time for which another program that makes its tables is waited for."""


class State(StrEnum):
    """How far a store's file is."""

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


def ensure_store(uri: str) -> None:
    """Make a SQLite store where there is none; leave other kinds of stores to MLflow.

    A half-made one, which an interrupted first command of earlier versions left, is set aside.

    Raises:
        TrackingError: it cannot be made, or its tables are not of this MLflow's version.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    file = Path(os.path.realpath(file))
    if state_of(uri) is State.WHOLE and not _lock_of(file).exists():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
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
    """Check that the tables of a SQLite store, where it has some, are of this MLflow's version.

    Raises:
        TrackingError: of an older or newer one, with what to do.
    """
    state = state_of(uri)
    if state is State.OLD:
        raise TrackingError(
            f"tracking store {hide_credentials(uri)} was made by an earlier version of MLflow, or "
            "its upgrade was interrupted. `adaptive-lora upgrade-store` makes a backup beside it "
            "and upgrades it; until then it stays as it is."
        )
    if state is State.NEWER:
        raise TrackingError(
            f"tracking store {hide_credentials(uri)} was made by a later version of MLflow; "
            "install that version (`pip install -U mlflow`), or choose another store with "
            "--tracking-uri."
        )


def state_of(uri: str) -> State:
    """Return how far the file of a SQLite store is.

    Raises:
        TrackingError: it holds another program's tables, or is damaged.
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

    def any_in(table: str, where: str = "") -> bool:
        found = table in tables and database.execute(f"SELECT 1 FROM {table} {where} LIMIT 1")
        return bool(found and found.fetchone())

    used = any_in("runs") or any_in("registered_models")
    used = used or any_in("experiments", "WHERE experiment_id <> 0")
    return State.OLD if used else State.HALF


@cache
def _revisions() -> tuple[str, ...]:
    """Return the versions of MLflow's tables that the installed one knows, the latest first."""
    script = ScriptDirectory.from_config(schema._get_alembic_config(""))
    return tuple(found.revision for found in script.walk_revisions())


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Be the only process that makes or upgrades this store; sweep what dead ones left."""
    with FileLock(_lock_of(file), thread_local=False):
        for left in file.parent.glob(f".{_escaped(file.name)}{_MAKING}*"):
            left.unlink(missing_ok=True)
        yield
        # Only now, with the store in place: whoever has waited finds it, and makes none.
        _lock_of(file).unlink(missing_ok=True)


def _lock_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")


def _escaped(name: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _settled(uri: str, file: Path) -> State:
    """Return a store's state once no other program, such as `mlflow ui`, is making it."""
    until = time.monotonic() + _OTHERS_SECONDS
    while (state := state_of(uri)) is State.HALF and (others := _users_of(file)):
        if time.monotonic() > until:
            raise unusable(uri, f"it is half made, and open in process {_listed(others)}")
        time.sleep(0.2)
    return state


def _users_of(file: Path) -> list[int]:
    """Return the other processes of this machine that have a file open, as far as can be seen."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(one.path == str(file) for one in process.open_files()):
                found.append(process.pid)
    return found


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _set_aside(file: Path) -> None:
    """Rename a half-made store, with a word."""
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
    """Return a name beside a file that is not taken."""
    name = f"{file.name}.{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = sum(one.name.startswith(name) for one in file.parent.iterdir())
    return file.with_name(f"{name}-{taken}" if taken else name)


@contextmanager
def _draft(file: Path) -> Iterator[Path]:
    """Give a name to make a store under; nothing is left of it after the block."""
    draft = file.with_name(f".{file.name}{_MAKING}{os.getpid()}")
    try:
        draft.touch(exist_ok=False)  # or MLflow would try for minutes where nothing can be written
        yield draft
    finally:
        for name in (draft.name, f"{draft.name}-journal", f"{draft.name}-wal", f"{draft.name}-shm"):
            draft.with_name(name).unlink(missing_ok=True)


def _put_in_place(draft: Path, file: Path) -> None:
    for place in (draft, draft.parent):
        handle = os.open(place, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.replace(draft, file)


def artifact_root() -> str | None:
    """Return the URI of this folder's artifacts, or None where MLflow's own relative path will do.

    MLflow decodes `%20` in a plain path, and writes quotes and colons into SQL as they are.
    """
    if not re.search(r"[%?:'\"\\]", str(Path.cwd())):
        return None
    return (Path.cwd() / ARTIFACTS).as_uri()


def _make(file: Path) -> None:
    """Make a store with all its tables and the default experiment."""
    with _draft(file) as draft:
        store = SqlAlchemyStore(sqlite_uri(draft), artifact_root() or ARTIFACTS)
        store._dispose_engine()
        SqlAlchemyStore._engine_map.pop(sqlite_uri(draft), None)
        _put_in_place(draft, file)


def upgrade(uri: str) -> Path | None:
    """Upgrade a SQLite store to the installed MLflow's tables, with a backup beside it.

    The store is copied, the copy is upgraded and checked, and then takes the store's name: at every
    moment there is a whole store, the old or the new one.

    Returns:
        The backup, or None where nothing was to be done.

    Raises:
        TrackingError: no such store, another kind, in use, or it cannot be upgraded.
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
                f"tracking store {file} is open in process {_listed(others)}; end it before the "
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
    with closing(sqlite3.connect(file, isolation_level=None)) as old, _draft(file) as draft:
        # Out of WAL mode, which leaves a file beside that would be taken for the new store's.
        old.execute("PRAGMA journal_mode = DELETE")
        old.execute("BEGIN IMMEDIATE")  # nobody else writes from here on
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(draft, isolation_level=None)) as copy:
            source.backup(copy)  # a connection that holds the lock cannot itself be copied
            _clear_temporary(copy)
        engine = schema.create_sqlalchemy_engine(sqlite_uri(draft))
        schema._upgrade_db(engine)
        engine.dispose()
        with closing(sqlite3.connect(draft)) as copy:
            (verdict,) = copy.execute("PRAGMA integrity_check").fetchone()
            count = "SELECT count(*) FROM runs"
            if verdict != "ok" or copy.execute(count).fetchone() != old.execute(count).fetchone():
                raise sqlite3.DatabaseError(f"the upgraded copy is not right: {verdict:.200}")
        backup = _backed_up(file)
        _put_in_place(draft, file)
        return backup


def _backed_up(file: Path) -> Path:
    """Give a store a second name, or find the one that an interrupted upgrade gave it."""
    for other in file.parent.glob(f"{_escaped(file.name)}.backup-*"):
        if other.samefile(file):
            return other
    backup = _free(file, "backup")
    try:
        os.link(file, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(file, backup)
    return backup


def _clear_temporary(database: sqlite3.Connection) -> None:
    """Undo a rewriting of a table that was interrupted before the original was removed."""
    listed = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in listed:
        if name.startswith(_TEMPORARY) and (name.removeprefix(_TEMPORARY),) in listed:
            database.execute(f'DROP TABLE "{name}"')
