"""Provenance of results: code, packages, machine and command line."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from adaptive_lora import __version__
from adaptive_lora.redaction import hide_credentials

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "mlflow", "numpy", "scipy")


def packages() -> str:
    """Return the package versions that affect results, such as `torch 2.13.0, peft 0.21.2`."""
    return ", ".join(f"{name} {number}" for name, number in _versions().items())


def provenance() -> dict[str, str]:
    """Return the facts needed to repeat a result, as text; without environment or credentials."""
    facts = {
        "adaptive_lora": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "command": command_line(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def command_line() -> str:
    """Return the command line, without credentials."""
    return hide_credentials(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


@cache  # a process keeps the packages that it has loaded
def _versions() -> Mapping[str, str]:
    return {name: version(name) for name in _PACKAGES}


@cache  # and the code
def commit() -> str:
    """Return the commit of the package's repository, `-dirty` where changed, or `unknown`."""
    folder = Path(__file__).resolve().parents[1]
    try:
        answers = [
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", str(folder)))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if answers[0].returncode != 0:
        return "unknown"
    return answers[0].stdout.strip() + ("-dirty" if answers[1].stdout.strip() else "")
