"""Write requirements.lock: every package with the hash of the file that pip chose here.

    make lock
    pip install --require-hashes -r requirements.lock

A lock holds for one platform and index, because torch has other files for each; so each user makes
their own, and from then on no file can change unnoticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Ask pip what it would install, and write name, version and hash of each file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        words += ["--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[dev]"]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = sorted(filter(None, map(line_of, items)), key=str.lower)
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} packages in requirements.lock")


def line_of(item: dict[str, Any]) -> str | None:
    """Return `name==version --hash=...` of an item of pip's report; None for this project."""
    hashes = item["download_info"].get("archive_info", {}).get("hashes")
    if item["metadata"]["name"] == "adaptive-lora":
        return None
    if not hashes:
        raise SystemExit(f"the index gives no hash of {item['metadata']['name']}")
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    return f"{name}=={version} \\\n    --hash=sha256:{hashes['sha256']}"


if __name__ == "__main__":
    main()
