"""MLproject entry point: one trial."""

import sys

import _project  # noqa: F401 - before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
