"""Copies of checkpoints in a storage that other machines reach."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adaptive_lora.config.storage import Storage
from adaptive_lora.errors import brief
from adaptive_lora.interruption import replacing
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.training.checkpoint_files import MANIFEST, STATE, TENSORS

_log = logging.getLogger(__name__)


class CheckpointMirror:
    """The checkpoints of one trial in a storage.

    A checkpoint is there once its manifest is, which is sent last: most storages rename nothing. A storage
    that fails gives a warning; training continues with the checkpoints on this machine's disk.
    """

    def __init__(self, url: str, trial: str) -> None:
        """Open the storage of a URL.

        Args:
            url: URL in the form of fsspec.
            trial: name of the trial's folder in it.

        Raises:
            ConfigError: the storage cannot be opened.
        """
        self._storage = Storage("--checkpoints", url)
        self._files, self._root = self._storage.files, f"{self._storage.root}/{trial}"

    def names(self, prefix: str) -> set[str]:
        """Return the names of the complete checkpoints that begin with a prefix; empty if they cannot be listed."""
        with self._warned("list the checkpoints"), suppress(FileNotFoundError):
            self._files.invalidate_cache()  # another machine may have written
            folders = [path.split("/")[-2:] for path in self._files.find(self._root)]
            return {folder for folder, file in folders if file == MANIFEST and folder.startswith(prefix)}
        return set()

    def fetch(self, name: str, folder: Path) -> bool:
        """Copy a checkpoint to a folder of this machine, and return whether that was possible."""
        with self._warned(f"read checkpoint {name}"), replacing(folder) as partial:
            partial.mkdir()
            for file in (STATE, TENSORS, MANIFEST):
                self._files.get_file(f"{self._root}/{name}/{file}", str(partial / file))
        return folder.exists()

    def put(self, folder: Path) -> None:
        """Copy a checkpoint of this machine to the storage."""
        with self._warned(f"take checkpoint {folder.name}"):
            for file in (STATE, TENSORS, MANIFEST):
                target = f"{self._root}/{folder.name}/{file}"
                try:
                    self._files.put_file(str(folder / file), target)
                except FileNotFoundError:  # a storage whose folders are made first
                    self._files.makedirs(f"{self._root}/{folder.name}", exist_ok=True)
                    self._files.put_file(str(folder / file), target)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints."""
        for name in names:
            self._remove(f"{self._root}/{name}")

    def remove_all(self) -> None:
        """Remove all checkpoints of a finished trial."""
        self._remove(self._root)

    def trials(self) -> set[str]:
        """Return the names of all trials' folders in the storage; empty if they cannot be listed."""
        with self._warned("list the checkpoints"), suppress(FileNotFoundError):
            self._files.invalidate_cache()
            home = self._files.ls(self._storage.root, detail=False)
            return {path.rstrip("/").rpartition("/")[2] for path in home}
        return set()

    def _remove(self, path: str) -> None:
        with self._warned("remove checkpoints"), suppress(FileNotFoundError):
            self._files.rm(path, recursive=True)

    @contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """Make a warning of what a storage's package raises in the block, which is any kind of error."""
        try:
            yield
        except Exception as error:
            reason = hide_credentials(self._storage.hidden(brief(error)))
            _log.warning("the storage of --checkpoints did not %s: %s. The trial continues without.", what, reason)
