"""Work that a user's process does and no test is about: processes of the tests are spared it."""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

_frozen_modules = 0


def freeze_modules() -> None:
    """Keep what was imported since the last call out of garbage collections.

    Each trial ends with a full collection, which takes half a second with all modules.
    """
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 100:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


def skip_syncs() -> None:
    """Leave files and SQLite stores in the system's cache until it writes them: no test cuts the power."""
    from sqlalchemy import Engine, event

    def relax(connection: Any, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    os.fsync = lambda descriptor: None


def draw_text_as_outlines() -> None:
    """Draw the text of PDF figures as outlines: making a font of the letters used is half of a report's time.

    `test_report` draws what users get.
    """
    from adaptive_lora.analysis.report import figures

    figures.STYLE = [figures.STYLE, {"pdf.fonttype": 3}]  # type: ignore[misc, assignment]


def skip_rendering_of_studies() -> None:
    """Make the figures of a study's report, but do not render them: that is a quarter of a small study's time.

    Their files hold two words, because MLflow's servers do not take empty artifacts. Reports that a test
    writes itself, and that of `finished`, are rendered.
    """
    from adaptive_lora.analysis.report import figures
    from adaptive_lora.runner import result

    save, write_report = figures._save, result.write_report

    def skip(figure: object, path: Path, title: str) -> str:
        for ending in (".png", ".pdf", ".svg"):
            path.with_suffix(ending).write_text("not rendered", encoding="utf-8")
        return "<svg/>"

    def write(*given: Any) -> Path:
        figures._save = skip  # type: ignore[assignment]
        try:
            return write_report(*given)
        finally:
            figures._save = save

    result.write_report = write  # type: ignore[assignment]
