"""Make the tokenizer and pretrain the embedded base anew: `python -m benchmarks.embedded_base FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.embedded_base.build import MODELS, STEPS, build_base


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder for tokenizer, weights and record")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus, weights and order [default: 0]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps [default: {STEPS}, as shipped]")
    parser.add_argument("--architecture", choices=tuple(MODELS), default="gpt2", help="[default: gpt2, as shipped]")
    given = parser.parse_args()
    if given.folder.exists() and (not given.folder.is_dir() or any(given.folder.iterdir())):
        parser.error(f"{given.folder} is not empty; give a new folder.")

    def show(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}  loss {loss:.4f}", flush=True)

    build_base(given.folder, seed=given.seed, steps=given.steps, architecture=given.architecture, on_step=show)
    print(f"written to {given.folder}")


if __name__ == "__main__":
    main()
