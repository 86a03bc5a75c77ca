"""This machine: Python, packages against their pins, device, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adaptive_lora.cli.doctor.finding import Finding, fail, ok, warn
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.precision import Precision

_PINS = Path(__file__).resolve().parents[3] / "constraints.txt"
_ADVISED = 2.0
"""GiB of free memory and disk below which a warning is given."""


def python(config: StudyConfig) -> Finding:
    """Check the interpreter."""
    return ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def packages(config: StudyConfig) -> list[Finding]:
    """Compare what is installed with what is required, and with the versions the tests ran with."""
    pins, right, findings = _pins(), 0, []
    for requirement in _required():
        name = canonicalize_name(requirement.name)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            findings.append(fail(name, f"not installed; pip install '{requirement}'"))
            continue
        pin = pins.get(name)
        if not requirement.specifier.contains(found, prereleases=True):
            text = f"{found}; required {requirement.specifier}, pip install '{requirement}'"
            findings.append(fail(name, text))
        elif pin is not None and found.partition("+")[0] != pin:
            findings.append(warn(name, f"{found}; the tests ran with {pin}"))
        else:
            right += 1
    against = "as pinned" if pins else "as required (no constraints.txt here to compare with)"
    return [ok("packages", f"{right} {against}"), *findings]


def _required() -> Iterator[Requirement]:
    for line in requires("adaptive-lora") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _pins() -> Mapping[str, str]:
    """Return package -> version that the tests ran with; empty where the file is not at hand."""
    if not _PINS.is_file():
        return {}
    lines = _PINS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): pin.strip() for name, pin in pairs}


def device(config: StudyConfig) -> Finding:
    """Say where trials compute and in which precisions natively."""
    import torch

    from adaptive_lora.models.device import resolve_precision

    if torch.cuda.is_available():
        place = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        native = [Precision.FP32, Precision.FP16]
        if torch.cuda.is_bf16_supported(including_emulation=False):
            native.append(Precision.BF16)
    else:
        place = f"CPU, {torch.get_num_threads()} threads"
        native = [Precision.FP32, *([Precision.BF16] if torch.cpu.get_capabilities().get("amx_bf16") else [])]
    return ok("device", f"{place}; native {', '.join(native)}; precision auto is {resolve_precision('auto')}")


def memory(config: StudyConfig) -> Finding:
    """Check free memory, of the GPU too where there is one."""
    free = psutil.virtual_memory().available / 2**30
    text = f"{free:.1f} GiB available ({_ADVISED:g} advised)"
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            text += f", GPU {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free"
    return ok("memory", text) if free >= _ADVISED else warn("memory", text)


def disk(config: StudyConfig) -> list[Finding]:
    """Check room and permission where a study writes."""
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
