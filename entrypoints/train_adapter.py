"""MLproject entry point: one trial."""

import _project  # before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["train", *_project.arguments()])
