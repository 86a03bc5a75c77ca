"""Where should LoRA's ranks go? An MLflow-tracked experiment suite that measures it."""

__version__ = "0.1.0"

__all__ = ["__version__"]
