"""Puts this checkout first on the import path.

`mlflow run` of a git version must run that version's package, not one that happens to be installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
