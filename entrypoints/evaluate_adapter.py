"""MLproject entry point: the score of a saved adapter."""

import _project  # before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["evaluate", *_project.arguments()])
