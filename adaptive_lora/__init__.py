"""Where should LoRA's ranks go? An MLflow-tracked experiment suite that measures it."""

import logging

from adaptive_lora.models.threads import bound_spinning

__version__ = "0.2.0"

__all__ = ["__version__"]

# Where bitsandbytes is installed, PEFT imports it, and it reports a kernel that is never used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

bound_spinning()  # here, since any module may be the first that loads torch
