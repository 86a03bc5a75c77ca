"""The address of a Ray cluster, checked before Ray is loaded."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from adaptive_lora.errors import ConfigError, brief


def require_ray_cluster(address: str) -> str:
    """Check that something listens where a Ray cluster is to be joined; Ray's own attempts take minutes.

    Returns:
        The address; for `auto` that of RAY_ADDRESS, or else of the cluster last started here, as in Ray.

    Raises:
        ConfigError: nothing does, or the address has another form.
    """
    found = address
    if address == "auto" and (found := os.environ.get("RAY_ADDRESS") or "auto") == "auto":
        try:
            found = _note_of_last_start().read_text(encoding="utf-8").strip()
        except OSError:
            # Ray would try the first cluster among the processes, such as that of another study, for minutes.
            raise ConfigError(
                f"ray_address {address}: no Ray cluster was started on this machine (there is no "
                f"{_note_of_last_start()}). Start one with `ray start --head`, give its HOST:PORT, or leave "
                "--ray-address out to start one on this machine."
            ) from None
    if found in ("", "local"):
        return found
    try:
        parts = urlsplit(found if "://" in found else f"//{found}")
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("", "ray") or not host or port is None:
        raise ConfigError(f"ray_address: required auto, HOST:PORT or ray://HOST:PORT, got {address!r}.")
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"ray_address {address}: no Ray cluster answers at {host}:{port} ({brief(error)}). Start one with "
            "`ray start --head`, or leave --ray-address out to start one on this machine."
        ) from None
    return found


def _note_of_last_start() -> Path:
    """Return the file in which `ray start` notes the address of its cluster."""
    folder = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    return Path(folder, "ray", "ray_current_cluster")
