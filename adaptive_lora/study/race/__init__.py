"""Racing of learning rates: clearly worse ones are stopped during training (`--race`)."""

from adaptive_lora.study.race.decide import RACE, Race, loss_at, require_rungs, rungs_of
from adaptive_lora.study.race.run import run_race

__all__ = ["RACE", "Race", "loss_at", "require_rungs", "run_race", "rungs_of"]
