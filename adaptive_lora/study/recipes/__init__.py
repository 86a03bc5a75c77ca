"""Recipes: how a method's plan becomes a trained model."""

from adaptive_lora.study.recipes.catalogue import RECIPES, Recipe
from adaptive_lora.study.recipes.trial_context import Job, RankEvent, Trained

__all__ = ["RECIPES", "Job", "RankEvent", "Recipe", "Trained"]
