"""MLproject entry point: the importance profile of a base."""

import _project  # before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["profile", *_project.arguments()])
