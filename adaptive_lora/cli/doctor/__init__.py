"""`doctor`: is this machine ready for a study? Reads much, changes nothing, shows no secrets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.console import Console

from adaptive_lora.cli.doctor.finding import Finding, fail
from adaptive_lora.cli.doctor.licences import base_licence, data_licence
from adaptive_lora.cli.doctor.machine import device, disk, memory, packages, python
from adaptive_lora.cli.doctor.services import base, hub, tracking
from adaptive_lora.config import StudyConfig
from adaptive_lora.redaction import hide_credentials, printable, shown

_CHECKS: Mapping[str, Callable[[StudyConfig], Finding | list[Finding]]] = {
    "python": python,
    "packages": packages,
    "device": device,
    "memory": memory,
    "disk": disk,
    "base model": base,
    "tracking": tracking,
    "hub": hub,
    "licence of base": base_licence,
    "licence of data": data_licence,
}


def diagnose(config: StudyConfig) -> list[Finding]:
    """Return all findings; each check stands alone, so that one failure hides no other."""
    found: list[Finding] = []
    for name, check in _CHECKS.items():
        try:
            findings = check(config)
        except Exception as error:  # a broken package can fail in any way
            findings = fail(name, f"cannot be checked: {type(error).__name__}: {error}")
        found += findings if isinstance(findings, list) else [findings]
    return [Finding(check=one.check, status=one.status, text=printable(hide_credentials(one.text))) for one in found]


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
            f"[{colour}]{finding.status:<4}[/] {shown(f'{finding.check:<16}')} {shown(finding.text)}",
            highlight=False,
            soft_wrap=True,
        )
