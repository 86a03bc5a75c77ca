"""Recipes: how a method's plan becomes a trained model."""

from adaptive_lora.study.recipes.catalogue import RECIPES, Recipe
from adaptive_lora.study.recipes.trial_context import RankEvent, TrainedTrial, TrialContext

__all__ = ["RECIPES", "RankEvent", "Recipe", "TrainedTrial", "TrialContext"]
