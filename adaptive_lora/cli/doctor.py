"""`doctor`: checks whether this machine is ready for a study; changes nothing, shows no secrets."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from adaptive_lora.config import StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.config.ray_place import require_ray_cluster
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import AdaptiveLoraError, ConfigError, MissingExtra, naming_extras
from adaptive_lora.redaction import hide_credentials, printable, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    status: str
    """Status: ok, warn or fail."""
    text: str


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check=check, status="ok", text=text)


def warn(check: str, text: str) -> Finding:
    """Return a finding with which a study runs, possibly not as intended."""
    return Finding(check=check, status="warn", text=text)


def fail(check: str, text: str) -> Finding:
    """Return a finding with which no study runs."""
    return Finding(check=check, status="fail", text=text)


_PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
_ADVISED = 2.0
"""GiB of free memory and disk below which a warning is given."""
_PATIENCE = 4
"""Maximum seconds to wait for one answer."""


def python(config: StudyConfig) -> Finding:
    """Check the interpreter."""
    return ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def packages(config: StudyConfig) -> list[Finding]:
    """Compare installed versions with the required ones and with those that the tests ran with."""
    pins = {}
    if _PINS.is_file():
        lines = _PINS.read_text(encoding="utf-8").splitlines()
        pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        pins = {canonicalize_name(name): pin.strip() for name, pin in pairs}
    right, findings, lacking = 0, [], []
    for requirement in map(Requirement, requires("adaptive-lora") or []):
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        if marker is not None and not core and not marker.evaluate({"extra": "study"}):
            continue
        name = canonicalize_name(requirement.name)
        pin = pins.get(name)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if core:
                findings.append(fail(name, f"not installed; pip install '{requirement}'"))
            else:
                lacking.append(name)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            text = f"{found}; required {requirement.specifier}, pip install '{requirement}'"
            findings.append(fail(name, text))
        elif pin is not None and found.partition("+")[0] != pin:
            findings.append(warn(name, f"{found}; the tests ran with {pin}"))
        else:
            right += 1
    if lacking:
        findings.append(fail("extra study", str(MissingExtra("a study", "study", lacking))))
    against = "as pinned" if pins else "as required (no constraints.txt here to compare with)"
    return [ok("packages", f"{right} {against}"), *findings]


def device(config: StudyConfig) -> Finding:
    """Report the device of trials and its native precisions."""
    import torch

    from adaptive_lora.models.device import resolve_precision

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        place = f"{count} x {torch.cuda.get_device_name()}"
        if count > 1:
            place += " (--devices all: a worker process on each)"
        native = [Precision.FP32, Precision.FP16]
        if torch.cuda.is_bf16_supported(including_emulation=False):
            native.append(Precision.BF16)
    else:
        place = f"CPU, {torch.get_num_threads()} threads"
        native = [Precision.FP32, *([Precision.BF16] if torch.cpu.get_capabilities().get("amx_bf16") else [])]
    return ok("device", f"{place}; native {', '.join(native)}; precision auto is {resolve_precision('auto')}")


def ray(config: StudyConfig) -> Finding:
    """Report Ray's version and check that its cluster answers; Ray is not loaded."""
    address = config.worker.ray_address
    try:
        text = f"Ray {version('ray')}"
    except PackageNotFoundError:
        text = str(MissingExtra("--engine ray", "ray", ["ray"]))
        return ok("ray", text) if address is None else fail("ray", text)
    try:
        if address is not None:
            text += f"; {require_ray_cluster(address)} answers"
        return ok("ray", text)
    except ConfigError as error:
        return fail("ray", f"{text}; {error}")


def memory(config: StudyConfig) -> Finding:
    """Check free memory, also of the GPU if there is one."""
    free = psutil.virtual_memory().available / 2**30
    text = f"{free:.1f} GiB available ({_ADVISED:g} advised)"
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            text += f", GPU {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free"
    return ok("memory", text) if free >= _ADVISED else warn("memory", text)


def disk(config: StudyConfig) -> list[Finding]:
    """Check free space and write permission in the folders that a study writes to."""
    places = {"disk": Path.cwd(), "disk of output": Path(config.tracking.output).absolute()}
    findings, seen = [], set()
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free / 2**30
        text = f"{free:.1f} GiB free in {there} ({_ADVISED:g} advised)"
        if not there.is_dir():
            findings.append(fail(name, f"{there} is a file; a folder is required"))
        elif not os.access(there, os.W_OK | os.X_OK):
            findings.append(fail(name, f"{there} cannot be written to"))
        elif there not in seen:
            findings.append(ok(name, text) if free >= _ADVISED else warn(name, text))
        seen.add(there)
    return findings


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
    """Read a server's health page, then make one real call, which its access rules may refuse."""
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
    """Return the server's health page, which needs no permission."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PATIENCE) as answer:
            return f"health {answer.read(100).decode(errors='replace').strip()}"
    except urllib.error.HTTPError as error:
        with error:
            return f"health {error.code}"
    except (OSError, ValueError) as error:
        return f"health unknown ({type(error).__name__})"


def hub(config: StudyConfig) -> Finding:
    """Check whether the Hugging Face hub can be reached, unless the user has set offline mode."""
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


_CHECKS: Mapping[str, Callable[[StudyConfig], Finding | list[Finding]]] = {
    "python": python,
    "packages": packages,
    "device": device,
    "ray": ray,
    "memory": memory,
    "disk": disk,
    "base model": base,
    "tracking": tracking,
    "hub": hub,
}


def diagnose(config: StudyConfig) -> list[Finding]:
    """Return all findings; the checks are independent, so that one failure hides no other."""
    found: list[Finding] = []
    for name, check in _CHECKS.items():
        try:
            with naming_extras(f"this check of {name}"):
                findings = check(config)
        except MissingExtra as error:
            findings = fail(name, str(error))
        except Exception as error:  # a broken package can fail in any way
            findings = fail(name, f"cannot be checked: {type(error).__name__}: {error}")
        found += findings if isinstance(findings, list) else [findings]
    return [Finding(check=one.check, status=one.status, text=printable(hide_credentials(one.text))) for one in found]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 without problems, 1 with warnings, 2 with failures."""
    statuses = {finding.status for finding in findings}
    return 2 if "fail" in statuses else 1 if "warn" in statuses else 0


def print_findings(findings: Iterable[Finding], console: Console) -> None:
    """Print one line per finding."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        colour = colours[finding.status]
        console.print(
            f"[{colour}]{finding.status:<4}[/] {shown(f'{finding.check:<16}')} {shown(finding.text)}",
            highlight=False,
            soft_wrap=True,
        )
