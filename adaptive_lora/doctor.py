"""`doctor`: is this machine ready for a study? Reads much, changes nothing, shows no secrets."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console

from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdaptiveLoraError


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the diagnosis."""

    check: str
    status: str
    """ok, warn or fail."""
    text: str


def diagnose(config: StudyConfig) -> list[Finding]:
    """Return all findings; each check stands alone, so that one failure hides no other."""
    return [
        _python(),
        *_packages(),
        _device(),
        _memory(),
        _disk(),
        _base(config),
        _tracking(config),
    ]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 where all is well, 1 with warnings, 2 with failures."""
    statuses = {finding.status for finding in findings}
    return 2 if "fail" in statuses else 1 if "warn" in statuses else 0


def print_findings(findings: Iterable[Finding], console: Console) -> None:
    """Print one line a finding."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        colour = colours[finding.status]
        console.print(
            f"[{colour}]{finding.status:<4}[/] {finding.check:<14} {finding.text}",
            highlight=False,
            soft_wrap=True,
        )


def _python() -> Finding:
    return Finding(check="python", status="ok", text=platform.python_version())


def _packages() -> Iterator[Finding]:
    for line in requires("adaptive-lora") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(
                check=requirement.name,
                status="fail",
                text=f"not installed; pip install '{requirement}'",
            )
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        text = found if fits else f"required {requirement.specifier}, got {found}"
        yield Finding(check=requirement.name, status="ok" if fits else "fail", text=text)


def _device() -> Finding:
    import torch

    from adaptive_lora.runtime import resolve_precision

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = (
        f"{name}, {torch.get_num_threads()} threads, precision auto is {resolve_precision('auto')}"
    )
    return Finding(check="device", status="ok", text=text)


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    status = "ok" if free >= 2 else "warn"
    return Finding(check="memory", status=status, text=f"{free:.1f} GiB available (2 advised)")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    status = "ok" if free >= 2 else "warn"
    return Finding(check="disk", status=status, text=f"{free:.1f} GiB free here (2 advised)")


def _base(config: StudyConfig) -> Finding:
    from adaptive_lora.models import locate, skeleton
    from adaptive_lora.sites import architecture_note, find_sites

    try:
        source, name, folder = locate(config.model, weights=False)
        model = skeleton(config.model)
        sites = find_sites(model)
    except AdaptiveLoraError as error:
        return Finding(check="base model", status="fail", text=str(error))
    note = architecture_note(model, sites)
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    text = f"{name}: {len(sites)} sites"
    if not weights:
        text += ", weights still to fetch" if source == "hub" else ", no weights (plan only)"
    if note is not None:
        text += f"; {note}"
    usable = weights or source == "hub"
    return Finding(
        check="base model", status="ok" if usable and note is None else "warn", text=text
    )


def _tracking(config: StudyConfig) -> Finding:
    from adaptive_lora.tracking.connection import probe

    try:
        text = probe(config.tracking)
    except AdaptiveLoraError as error:
        return Finding(check="tracking", status="fail", text=str(error))
    return Finding(check="tracking", status="ok", text=text)
