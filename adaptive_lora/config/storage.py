"""Storage that a URL names, by way of fsspec: opened and checked, with its credentials in no message."""

from __future__ import annotations

from urllib.parse import urlsplit

from adaptive_lora.config.sections import TrackingConfig
from adaptive_lora.errors import ConfigError, brief, unknown_name
from adaptive_lora.redaction import HIDDEN

_READ_ONLY = ("http", "https", "data", "github", "jlab", "reference", "zip", "tar", "libarchive")
"""Protocols of fsspec that nothing can be written to, or only a whole archive at once."""


def is_url(place: str) -> bool:
    """Return whether a place is the URL of a storage, not a path."""
    return "://" in place or "::" in place


class Storage:
    """A folder in the storage of a URL."""

    def __init__(self, option: str, url: str) -> None:
        """Open the storage; most kinds connect only when they are first read or written.

        Args:
            option: option that gave the URL, for messages.
            url: URL in the form of fsspec, such as `s3://bucket/folder`.

        Raises:
            ConfigError: the protocol is unknown or read-only, its package is not installed, or the storage
                cannot be opened.
        """
        import fsspec

        self._userinfo = urlsplit(url.rpartition("::")[2]).netloc.rpartition("@")[0]
        given = f"{option} {self.hidden(url)}"
        protocol = url.partition("://")[0].partition("::")[0]
        known = {*fsspec.available_protocols(), *fsspec.registry}
        if protocol not in known:
            named = unknown_name("storage protocol", protocol, known)
            raise ConfigError(f"{given}: {named}. Give a URL that fsspec knows, or a folder.")
        if protocol in _READ_ONLY:
            raise ConfigError(f"{given}: required a storage that can be written to; {protocol} cannot.")
        try:
            self.files, root = fsspec.core.url_to_fs(url)  # of one URL always the same connection
        except ImportError as error:
            raise ConfigError(
                f"{given}: {protocol} needs a package that is not installed. {self.hidden(brief(error))}: pip install "
                "it, on every machine that trains."
            ) from None
        except Exception as error:  # a storage's package raises what it likes
            raise ConfigError(f"{given} cannot be opened: {self.hidden(brief(error))}") from None
        self.root = str(root).rstrip("/")
        """The folder's path in the storage's own form."""
        if not self.root:
            raise ConfigError(f"{given}: required a bucket or folder after {protocol}://.")

    def hidden(self, text: str) -> str:
        """Return a text without the URL's user and password, which errors name with no scheme before them."""
        return text.replace(f"{self._userinfo}@", f"{HIDDEN}@") if self._userinfo else text


def require_checkpoint_storage(config: TrackingConfig) -> None:
    """Check that the storage of checkpoints can be opened; a folder is left to the first checkpoint.

    Raises:
        ConfigError: it cannot.
    """
    if config.checkpoints is not None and is_url(config.checkpoints):
        Storage("--checkpoints", config.checkpoints)
