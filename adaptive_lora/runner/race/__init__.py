"""Racing of learning rates: clearly worse ones are stopped during training (`--race`)."""

from adaptive_lora.runner.race.decide import RACE, Race, loss_at, require_rungs, rungs_of
from adaptive_lora.runner.race.run import race_rounds

__all__ = ["RACE", "Race", "loss_at", "race_rounds", "require_rungs", "rungs_of"]
