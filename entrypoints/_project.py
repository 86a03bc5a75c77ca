"""Puts this checkout first on the import path, and finds its study files by name.

`mlflow run` of a git version must run that version's package, not one that happens to be installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
STUDIES = Path(__file__).resolve().parent / "studies"


def arguments() -> list[str]:
    """Return the words of this command; `--study NAME` brings `studies/NAME.yaml` where that is.

    A study file of the user's own (`--config`) goes before it.
    """
    words = sys.argv[1:]
    given = {word.partition("=")[0] for word in words}
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        name = value if equals else "".join(words[at + 1 : at + 2])
        file = STUDIES / f"{name}.yaml"
        if option == "--study" and "--config" not in given and file.is_file():
            print(f"study file {file}", file=sys.stderr)
            return ["--config", str(file), *words]
    return words
