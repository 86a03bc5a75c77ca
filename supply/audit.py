"""Ask pip-audit about supply/requirements.lock, and tell "nothing found" from "not asked".

    make audit

pip-audit alone ends with success where the service knew nothing of a package. Here that is no
result. Exit code 0: every package was asked about, and each finding has an answer in
supply/answers.toml; 1: findings without an answer; 3: packages that could not be asked about.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "supply" / "requirements.lock"
ANSWERS = ROOT / "supply" / "answers.toml"
SERVICES = ("pypi", "osv")
"""Asked in this order until one knows every package; both need a network."""
FOUND, NOT_ASKED = 1, 3


def report_of(service: str) -> Mapping[str, Any] | str:
    """Return pip-audit's report from one service, or why there is none."""
    words = ["-m", "pip_audit", "--require-hashes", "--disable-pip", "--progress-spinner=off"]
    words += ["--format=json", f"--vulnerability-service={service}", f"--requirement={LOCK}"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    try:
        report: Mapping[str, Any] = json.loads(done.stdout)
    except ValueError:
        return (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return report


def judge(report: Mapping[str, Any] | str, answers: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return the exit code and what there is to say.

    Args:
        report: pip-audit's, or why there is none.
        answers: id of a finding -> why it does no harm here.
    """
    if isinstance(report, str):
        return NOT_ASKED, [f"not asked: {report}"]
    packages = report.get("dependencies", [])
    skipped = [package for package in packages if "skip_reason" in package]
    code, lines = 0, []
    for package in packages:
        for finding in package.get("vulns", []):
            names = sorted({finding["id"], *finding.get("aliases", [])})
            answer = next((answers[name] for name in names if name in answers), None)
            code = code if answer else FOUND
            fixed = ", ".join(finding.get("fix_versions", [])) or "no version"
            what = f"{package['name']} {package['version']}: {finding['id']}, fixed in {fixed}"
            lines.append(f"{what}: {answer or 'NO ANSWER in supply/answers.toml'}")
    lines.append(f"{len(packages) - len(skipped)} packages asked about, {len(lines)} findings")
    if skipped or not packages:
        reason = skipped[0]["skip_reason"] if skipped else "the report names no package"
        lines.append(f"{len(skipped)} packages could NOT be asked about, such as: {reason}")
        code = code or NOT_ASKED
    return code, lines


def main() -> int:
    """Ask, print, and return the exit code."""
    answers = tomllib.loads(ANSWERS.read_text(encoding="utf-8"))
    code = NOT_ASKED
    for service in SERVICES:
        code, lines = judge(report_of(service), answers)
        print(*(f"{service}: {line}" for line in lines), sep="\n")
        if code != NOT_ASKED:
            return code
    print("This is no result: no service could be asked. Run `make audit` where one is reachable.")
    return code


if __name__ == "__main__":
    sys.exit(main())
