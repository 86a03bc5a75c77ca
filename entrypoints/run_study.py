"""MLproject entry point: the whole study."""

import _project  # before the package
from adaptive_lora.cli import main

if __name__ == "__main__":
    main(["study", *_project.arguments()])
