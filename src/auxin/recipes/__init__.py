"""Recipes: staged runs as data, their price, and their runner."""

from auxin.recipes.library import builtin_recipes, load_recipe, training_recipe
from auxin.recipes.price import RecipePrice, price_recipe
from auxin.recipes.results import rewrite_report
from auxin.recipes.runner import run_recipe
from auxin.recipes.schema import Recipe
from auxin.recipes.seeds import SeedsPrice, part_of, price_seeds, read_comparison, run_seeds, seed_results
from auxin.recipes.together import refuse_together, run_together

__all__ = [
    "Recipe",
    "RecipePrice",
    "SeedsPrice",
    "builtin_recipes",
    "load_recipe",
    "part_of",
    "price_recipe",
    "price_seeds",
    "read_comparison",
    "refuse_together",
    "rewrite_report",
    "run_recipe",
    "run_seeds",
    "run_together",
    "seed_results",
    "training_recipe",
]
