"""`export --push`: an adapter to the Hugging Face hub, with its card; what is wrong is told before torch is loaded."""

from __future__ import annotations

import dataclasses
import re
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaptive_lora.config import study_from
from adaptive_lora.errors import ConfigError, unknown_name
from adaptive_lora.runner.hub import MAIN, Pushed, find_repository, require_branch_name, require_repository_name, upload

FORMS = ("trained", "uniform", "merged")
"""Forms of an adapter: as trained, with one rank and scale 1, or in the weights of its base."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,50}")


def push(
    adapter: str | PathLike[str],
    repository: str,
    *,
    form: str = "trained",
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    update: bool = False,
    license: str | None = None,
    **settings: Any,
) -> Pushed:
    """Publish an adapter as one commit on the Hugging Face hub, and read it back.

    The repository gets the adapter's safetensors and JSON files and a card with base, method, ranks, verdict, data,
    proof and licence; no code. Paths of this machine are left out. The token is the one that `huggingface_hub` finds
    (`HF_TOKEN`, or that of `hf auth login`).

    Args:
        adapter: folder of a saved adapter, or its address in the tracking store, such as
            `models:/adaptive-lora@champion`; the latter has verdict and data for the card. An adapter without a
            registered proof is loaded on its base first.
        repository: `ORG/NAME`; created if it does not exist.
        form: `trained`, `uniform` (one rank and scale 1, for any server) or `merged` (a whole model).
        public: whether everybody may read a new repository; by default its members alone can. An existing one stays
            as it is, and this must say so.
        revision: branch; created from `main` if it does not exist. None: `main`.
        message: title of the commit; None: the method's label.
        update: whether to replace files of a branch that has some. Files of an earlier adapter or model that the new
            one does not have are deleted; all others stay.
        license: licence of the adapter by the hub's name, such as `apache-2.0`; None: the card says that none is given.
        **settings: `tracking_uri` and `trust_remote_code`, as of `adaptive-lora export`.

    Returns:
        Address, commit, and SHA-256 of every file, as read back from the hub.

    Raises:
        ConfigError: a name is invalid, or the repository exists and the choices do not allow for it.
        AdapterError: there is no adapter, or it does not load on its base.
        HubError: no token, no permission, no connection, or other files on the hub than were sent.
    """
    if form not in FORMS:
        raise ConfigError(unknown_name("form", form, FORMS))
    require_repository_name(repository)
    if revision is not None:
        require_branch_name(revision)
    if license is not None and not _LICENCE.fullmatch(license):
        raise ConfigError(f"'{license:.100}' is no licence of the hub: required a name such as apache-2.0 or other.")
    if message is not None and not message.strip():
        raise ConfigError("the message of the commit is empty; give a text, or leave it out.")
    config = study_from({name: value for name, value in settings.items() if value is not None})
    place = find_repository(repository, public=public, branch=revision or MAIN, update=update)
    from adaptive_lora.runner.loaded import access
    from adaptive_lora.runner.publication import prepare

    with access(str(adapter), config.tracking, "adaptive_lora.push"), TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        method, left_out = prepare(config, str(adapter), form, files, license)
        pushed = upload(files, place, message or f"Adapter of {method}, by adaptive-lora")
    return dataclasses.replace(pushed, left_out=left_out)
