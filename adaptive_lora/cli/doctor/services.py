"""What a study reaches: its base model, the tracking store, the hub."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from adaptive_lora.cli.doctor.finding import Finding, fail, ok, warn
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.errors import AdaptiveLoraError

_PATIENCE = 4
"""Seconds for one answer."""


def base(config: StudyConfig) -> Finding:
    """Check that the base can be planned and trained."""
    from adaptive_lora.models.base import locate, require_weights, skeleton
    from adaptive_lora.models.sites import site_notes, survey_sites

    try:
        source, name, folder = locate(config.model, weights=False)
        model = skeleton(config.model)
        survey = survey_sites(model)
        weights = folder.is_file() or any(folder.glob("*.safetensors"))
        if not weights and any(folder.glob("pytorch_model*.bin")):
            require_weights(folder, trust_remote_code=config.model.trust_remote_code)
    except AdaptiveLoraError as error:
        return fail("base model", str(error))
    text = f"{name}: {len(survey.sites)} sites"
    if not weights:
        text += ", weights still to fetch" if source == "hub" else ", no weights (plan only)"
    notes = site_notes(model, survey)
    text = "; ".join([text, *notes])
    usable = weights or source == "hub"
    return ok("base model", text) if usable and not notes else warn("base model", text)


def tracking(config: StudyConfig) -> Finding:
    """Ask a server whether it is well, then make one real call, which its security may refuse."""
    from adaptive_lora.config.store_place import store_uri
    from adaptive_lora.tracking.connection import probe

    uri, started = store_uri(config.tracking), time.perf_counter()
    health = ""
    try:
        if uri.startswith(("http://", "https://")):
            health = f"; {_health(uri)}"
        text = probe(config.tracking)
    except AdaptiveLoraError as error:
        return fail("tracking", f"{error}{health}")
    return ok("tracking", f"{text}{health} ({time.perf_counter() - started:.1f} s)")


def _health(uri: str) -> str:
    """Return what the server's health page says; it needs no permission."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PATIENCE) as answer:
            return f"health {answer.read(100).decode(errors='replace').strip()}"
    except urllib.error.HTTPError as error:
        with error:
            return f"health {error.code}"
    except (OSError, ValueError) as error:
        return f"health unknown ({type(error).__name__})"


def hub(config: StudyConfig) -> Finding:
    """Check whether the Hugging Face hub can be reached, unless the user wants to be offline."""
    from huggingface_hub import constants, get_token

    needed = [
        what
        for what, name in (("base", config.model.model), ("data", config.data.data))
        if name != "embedded" and PlantedTeacher.parse(name) is None and not Path(name).exists()
    ]
    token = "a token is set" if get_token() else "no token"
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return ok("hub", f"offline, as the environment says: only what is cached is used; {token}")
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_PATIENCE):
            return ok("hub", f"{constants.ENDPOINT} answers; {token}")
    except urllib.error.HTTPError as error:
        with error:
            reason = f"answers {error.code}"
    except (OSError, ValueError) as error:
        reason = f"cannot be reached ({getattr(error, 'reason', error)})"
    if needed:
        text = f"{constants.ENDPOINT} {reason}; {' and '.join(needed)} must be cached"
        return warn("hub", f"{text}; {token}")
    return ok("hub", f"{constants.ENDPOINT} {reason}; not needed for this base and data")
