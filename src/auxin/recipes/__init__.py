"""Recipes: staged runs as data, their price, and their runner."""

from auxin.recipes.library import builtin_recipes, load_recipe, training_recipe
from auxin.recipes.price import RecipePrice, price_recipe
from auxin.recipes.runner import rewrite_report, run_recipe
from auxin.recipes.schema import Recipe

__all__ = [
    "Recipe",
    "RecipePrice",
    "builtin_recipes",
    "load_recipe",
    "price_recipe",
    "rewrite_report",
    "run_recipe",
    "training_recipe",
]
