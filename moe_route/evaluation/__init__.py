"""Evaluation of steering by a recipe: find experts, choose a setting, compare with all controls, report; resumable.

recipe = read_recipe("demo")
evaluation = evaluate(recipe, "results")
print(evaluation.report)
"""

from moe_route.evaluation.comparison import mcnemar
from moe_route.evaluation.pipeline import Evaluation, NullPlanError, evaluate
from moe_route.evaluation.recipe import Recipe, parse_assignment, read_recipe, shipped_recipes
from moe_route.evaluation.scoring import flexible_extract, normalized_number
from moe_route.evaluation.settings import RecipeError
from moe_route.runs.job import ForeignFolderError

__all__ = [
    "Evaluation",
    "ForeignFolderError",
    "NullPlanError",
    "Recipe",
    "RecipeError",
    "evaluate",
    "flexible_extract",
    "mcnemar",
    "normalized_number",
    "parse_assignment",
    "read_recipe",
    "shipped_recipes",
]
