"""MLproject entry point: the importance profile of a base."""

import sys

import _project  # noqa: F401 - before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["profile", *sys.argv[1:]])
