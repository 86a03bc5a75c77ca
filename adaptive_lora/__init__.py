"""Where should LoRA's ranks go? An MLflow-tracked experiment suite that measures it."""

import logging

__version__ = "0.2.0"

__all__ = ["__version__"]

# Where bitsandbytes is installed, PEFT imports it, and it reports a kernel that is never used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
