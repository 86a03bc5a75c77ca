"""The tracking store and experiment, resolved and checked before mlflow is loaded."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adaptive_lora.config.sections import EXPERIMENT, TrackingConfig
from adaptive_lora.errors import ConfigError, TrackingError
from adaptive_lora.options import out_of_limits
from adaptive_lora.redaction import hide_credentials

DEFAULT_STORE = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "adaptive-lora"
_SQLITE = re.compile(r"sqlite(?:\+pysqlite)?:///(?!file:)(?=.)")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SCHEMES = {"", "file", "http", "https", "sqlite", "databricks", "databricks-uc", "uc", *_PORTS}
"""URI schemes supported by MLflow itself; other packages may add some."""
_RETRY_SECONDS = 0.6
"""Seconds for which a refused connection is retried, because the server may be starting."""
_SILENCE_SECONDS = 8.0
"""Seconds within which a server must answer."""


def store_uri(config: TrackingConfig) -> str:
    """Return the URI of the tracking store in MLflow's form.

    The option takes precedence over MLFLOW_TRACKING_URI, and that over the default. The path of a
    SQLite file is made absolute: MLflow caches one connection per URI, so a relative URI would
    keep meaning the folder in which it was first used.
    """
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    parts = _sqlite_parts(uri)
    return uri if parts is None else sqlite_uri(*parts)


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store's file; None for every other kind of store."""
    parts = _sqlite_parts(uri)
    return None if parts is None else parts[0]


def sqlite_uri(file: Path, query: str = "") -> str:
    """Return the URI by which MLflow and SQLAlchemy open a file, with special characters of its name encoded.

    SQLAlchemy 2.1 decodes `%20` in the path and ends it at `?`. With the driver's name in the URI,
    MLflow makes no folder of the encoded name.
    """
    from packaging.version import Version

    scheme, path = "sqlite", str(file)
    if re.search("[%?]", path) and Version(version("SQLAlchemy")).release >= (2, 1):
        scheme, path = "sqlite+pysqlite", path.replace("%", "%25").replace("?", "%3F")
    return f"{scheme}:///{path}{f'?{query}' if query else ''}"


def _sqlite_parts(uri: str) -> tuple[Path, str] | None:
    """Return file and query of a SQLite URI.

    The path is percent-decoded, as SQLAlchemy does, unless only its literal form is an existing
    file or folder, because users paste paths into URIs unencoded.
    """
    prefix = _SQLITE.match(uri)
    if prefix is None:
        return None
    rest = uri[prefix.end() :]
    text, _, query = rest.partition("?")
    if "/" in query and not _exists(Path(text)) and _exists(Path(rest).parent):
        text, query = rest, ""
    literal, decoded = Path(text), Path(unquote(text))
    chosen = decoded
    if not _exists(decoded) and (_exists(literal) or (_exists(literal.parent) and not _exists(decoded.parent))):
        chosen = literal
    return Path.cwd() / chosen, query


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # not a valid file name
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentChoice:
    """An MLflow experiment and who chose it."""

    name: str | None
    """Name of the experiment; None where it is chosen by id."""
    id: str | None = None
    """Id of the experiment, which must exist."""
    by: str = ""
    """Name of the environment variable that chose it; empty where the option or the default did."""


def chosen_experiment(config: TrackingConfig) -> ExperimentChoice:
    """Return the experiment of a configuration, else that of MLflow's environment variables, else the default.

    Raises:
        ConfigError: the name in the environment is not a valid experiment name.
    """
    if config.experiment is not None:
        return ExperimentChoice(name=config.experiment)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if name:
        problem = out_of_limits("MLFLOW_EXPERIMENT_NAME", name, EXPERIMENT)
        if problem:
            raise ConfigError(problem)
        both = "MLFLOW_EXPERIMENT_NAME" + (" and MLFLOW_EXPERIMENT_ID" if given else "")
        return ExperimentChoice(name=name, id=given or None, by=both)
    if given:
        return ExperimentChoice(name=None, id=given, by="MLFLOW_EXPERIMENT_ID")
    return ExperimentChoice(name=DEFAULT_EXPERIMENT)


def unusable(uri: str, reason: str, code: str = "") -> TrackingError:
    """Return the error for a store that cannot be used.

    Args:
        uri: URI of the store; credentials are hidden in the message.
        reason: reason, in one line.
        code: MLflow's error code, or empty.
    """
    if "host header" in reason.lower():  # MLflow reports this as a permission error
        remedy = (
            "The server does not know itself by this name: start it with `mlflow server "
            "--allowed-hosts NAME[:PORT],...`, or call it by a name that it knows."
        )
    elif code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        remedy = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    else:
        remedy = f"Start the server, set --tracking-uri or MLFLOW_TRACKING_URI, or leave both out for {DEFAULT_STORE}."
    return TrackingError(f"tracking store {hide_credentials(uri)} cannot be used: {reason[:300]}. {remedy}")


def require_reachable(config: TrackingConfig, *, must_exist: bool = False) -> None:
    """Check without mlflow that a store can be used; nothing is created.

    A server counts as reachable if it answers at all; permissions are checked later.

    Args:
        config: tracking settings.
        must_exist: whether a missing database is an error, for commands that only read.

    Raises:
        TrackingError: no server answers, there is no database, or the URI scheme is unknown.
        ConfigError: the experiment in the environment is not a valid name or id.
    """
    chosen_experiment(config)
    uri = store_uri(config)
    file = sqlite_file(uri)
    if file is not None:
        require_database(uri, file, must_exist=must_exist)
        return
    try:
        parts = urlsplit(uri)
        scheme, host, port = parts.scheme.partition("+")[0], parts.hostname, parts.port
    except ValueError as error:
        raise unusable(uri, str(error)) from None
    plugins = {found.name for found in entry_points(group="mlflow.tracking_store")}
    if ":" in uri and scheme not in _SCHEMES | plugins:
        raise unusable(uri, f"'{scheme}' is no kind of store that MLflow knows")
    if scheme in ("http", "https"):
        shown = f"[{host}]" if ":" in (host or "") else host
        address = f"{scheme}://{shown}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        _require_answer(uri, address)
    elif scheme in _PORTS and host:
        port = port or _PORTS[scheme]
        try:
            socket.create_connection((host, port), timeout=_SILENCE_SECONDS).close()
        except OSError as error:
            raise unusable(uri, f"no connection to {host}:{port} ({error})") from None


def require_database(uri: str, file: Path, *, must_exist: bool = False) -> None:
    """Check that a SQLite store's file is a database; without this check MLflow retries for a minute.

    Raises:
        TrackingError: the path is a folder, a file of another kind or below a file, or is missing
            though it must exist.
    """
    if must_exist and not _exists(file):
        raise TrackingError(
            f"there is no tracking store {file}; run `adaptive-lora study` first, or set --tracking-uri."
        )
    above = next((place for place in file.parents if _exists(place)), file.parent)
    if not above.is_dir():
        raise unusable(uri, f"{above} is no folder")
    if file.is_dir():
        raise unusable(uri, f"{file} is a folder")
    if not file.is_file():
        return
    try:
        with closing(open_database(file)) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return  # locked by a writer, so it is a database
        raise unusable(uri, f"{file} is no SQLite database ({error})") from error


def open_database(file: Path) -> sqlite3.Connection:
    """Open the file of a SQLite store that exists.

    The connection is not read-only: a transaction that a process left unfinished when it died must
    be rolled back first.
    """
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True)


def _require_answer(uri: str, address: str) -> None:
    """Ask a tracking server for its health page, which needs no permission."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    end = time.monotonic() + _RETRY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=_SILENCE_SECONDS):
                return
        except urllib.error.HTTPError as error:
            error.close()
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):  # MLflow has its own settings for certificates
                return
            if isinstance(reason, ConnectionError) and time.monotonic() < end:
                time.sleep(0.2)
                continue
            raise unusable(uri, f"no answer from {address} ({reason})") from None
