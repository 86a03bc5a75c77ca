"""MLproject entry point: the score of a saved adapter."""

import sys

import _project  # noqa: F401 - before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
