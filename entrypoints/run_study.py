"""MLproject entry point: the whole study."""

import sys

import _project  # noqa: F401 - before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
