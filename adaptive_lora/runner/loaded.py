"""Trained adapters loaded for use: from the registry, a run, or a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from adaptive_lora import serving
from adaptive_lora.config import TrackingConfig, study_from
from adaptive_lora.errors import AdapterError, ConfigError, TrackingError, brief, require_extra

_URIS = ("models:/", "runs:/")
"""Beginnings of addresses in a tracking store."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class LoadedAdapter:
    """An adapter on its base, in evaluation mode."""

    model: Any
    """PEFT model, or a model with a tuner of this package; on a GPU where there is one."""
    tokenizer: Any
    """Tokenizer of its base, or the processor of images."""
    record: Mapping[str, Any]
    """Record of the adapter: base with content hash, precision, prompt template, task."""

    def answer(self, rows: Iterable[Mapping[str, Any]], *, max_new_tokens: int = 64) -> list[Any]:
        """Answer rows as the served adapter does.

        Args:
            rows: dictionaries with the columns of the adapter's task, such as `prompt`, `instruction` with `input`, or
                `messages` for text generation, and `text` for classification.
            max_new_tokens: maximum length of a generated answer, in tokens.

        Returns:
            One answer per row: a text, the name of a class, or a number.

        Raises:
            ValueError: a row has not the columns that the task needs, or cannot be asked.
        """
        return serving.answer((self.model, self.tokenizer, self.record), rows, max_new_tokens)

    def __repr__(self) -> str:
        """Return task and base; the model would be pages."""
        return f"<{type(self).__name__}: {self.record['task']['name']} on {self.record['base']['name']}>"


def load(
    adapter: str | PathLike[str], *, tracking_uri: str | None = None, trust_remote_code: bool = False
) -> LoadedAdapter:
    """Load a trained adapter with its base, whose content hash must be the recorded one.

    Files are read, not run: nothing of a model that someone registered is executed.

    Args:
        adapter: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID/PATH`, or the folder of an adapter.
        tracking_uri: URI of the tracking store that holds it; None: MLFLOW_TRACKING_URI or the store of this folder.
        trust_remote_code: whether to run the base's own Python code.

    Raises:
        AdapterError: there is no such adapter, or it does not load on its base.
        TrackingError: the tracking store cannot be used.
        MissingExtra: an address needs `adaptive-lora[study]`, which is not installed.
    """
    if not isinstance(adapter, str | PathLike):
        raise ConfigError(f"required the address or folder of an adapter; got {type(adapter).__name__}.")
    place = study_from({} if tracking_uri is None else {"tracking_uri": tracking_uri}).tracking
    if tracking_uri is not None and not is_address(str(adapter)):
        raise ConfigError(f"tracking_uri applies to {' and '.join(_URIS)} addresses; {adapter} is a folder.")
    with access(str(adapter), place, "adaptive_lora.load"):
        model, tokenizer, record = opened(str(adapter), place, trust_remote_code=trust_remote_code)
    return LoadedAdapter(model=model, tokenizer=tokenizer, record=record)


@contextmanager
def access(adapter: str, place: TrackingConfig, caller: str) -> Iterator[None]:
    """Leave the caller's process and its MLflow as they were, and require what reading an adapter needs.

    Args:
        adapter: folder, or address in a tracking store.
        place: the tracking store.
        caller: public function that reads it.

    Raises:
        TrackingError: the tracking store cannot be used.
        MissingExtra: an address needs `adaptive-lora[study]`, which is not installed.
    """
    from adaptive_lora.runner.guest import unchanged_process

    with ExitStack() as stack:
        stack.enter_context(unchanged_process())
        if is_address(adapter):
            require_extra("study", f"{caller} of an address in a tracking store")
            from adaptive_lora.config.store_place import require_reachable
            from adaptive_lora.tracking.connection import unchanged_mlflow

            require_reachable(place, must_exist=True)
            stack.enter_context(unchanged_mlflow(place))
        yield


def opened(adapter: str, place: TrackingConfig, *, trust_remote_code: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Return adapted model, processor and record of an adapter, as in serving.

    Raises:
        AdapterError: there is no such adapter, or it does not load on its base.
    """
    folder = adapter_files(adapter, place)
    from adaptive_lora.models.errors import is_bug

    try:
        return serving.load_adapter(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # PEFT, transformers and safetensors raise their own types
        if is_bug(error):
            raise
        raise AdapterError(f"adapter {adapter} cannot be loaded: {brief(error)}") from error


def adapter_files(adapter: str, place: TrackingConfig) -> Path:
    """Return the local folder of an adapter given as a folder or by its address in a tracking store.

    Raises:
        AdapterError: there is no such adapter.
    """
    if is_address(adapter):
        from adaptive_lora.tracking import connect
        from adaptive_lora.tracking.registry import adapter_folder

        connect(place, must_exist=True)
        try:
            return adapter_folder(adapter)
        except TrackingError as error:
            raise AdapterError(str(error)) from error
    folder = Path(adapter)
    try:
        found = (folder / serving.RECORD).is_file()
    except (OSError, ValueError):  # not a valid file name
        found = False
    if not found:
        raise AdapterError(
            f"{adapter:.200} is no adapter folder: required {serving.RECORD} beside PEFT's "
            "files, or give a models:/ URI."
        )
    return folder


def is_address(adapter: str) -> bool:
    """Return whether an adapter is given by its address in a tracking store."""
    return adapter.startswith(_URIS)
