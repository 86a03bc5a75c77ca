"""MLproject entry point: the verdict of a study."""

import sys

import _project  # noqa: F401 - before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
