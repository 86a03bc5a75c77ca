"""Recipes: how a method's plan becomes a trained model."""

from adaptive_lora.recipes.catalogue import RECIPES, Recipe
from adaptive_lora.recipes.job import Job, RankEvent, Trained

__all__ = ["RECIPES", "Job", "RankEvent", "Recipe", "Trained"]
