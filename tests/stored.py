"""Stores that earlier versions wrote, unpacked where a test can use them."""

from __future__ import annotations

import sqlite3
import tarfile
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
_PLACES = {
    "runs": ("artifact_uri",),
    "experiments": ("artifact_location",),
    "logged_models": ("artifact_location",),
    "model_versions": ("storage_location", "source"),
}
"""Columns of MLflow's tables that hold absolute paths."""


def unpack_store(version: str, folder: Path) -> str:
    """Unpack the store of a version into a folder; return its tracking URI.

    `0_1`: a study `stored` of the embedded base and tasks, written by version 0.1.0 with its
    default scale policy (two seeds, rate 1e-2, four steps of at most 60 examples, fp32):

        adaptive-lora study --study stored --methods "uniform:rank=1 linear_decay:rank=2,low_rank=1
            uniform:rank=1,scaling=constant_alpha" --seeds 0,1 --lr 1e-2 --max-steps 4
            --max-examples 60 --precision fp32

    Its reports and the adapters that were not registered are left out.
    """
    with tarfile.open(FIXTURES / f"store_{version}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table, columns in _PLACES.items():
            for column in columns:
                database.execute(f"UPDATE {table} SET {column} = replace({column}, '/STORE', ?)", (str(folder),))
    database.close()
    return f"sqlite:///{folder}/mlflow.db"
