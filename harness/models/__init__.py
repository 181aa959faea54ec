"""Small models made on the spot, for hosts that reach no model hub: `recipe:NAME` in a cell.

A recipe is a frozen value and a builder; `ensure` makes its folder once (config, weights, tokenizer) and returns it.
"""

from harness.models.circuit import RetrievalRecipe
from harness.models.circuit_mla import MlaRetrievalRecipe
from harness.models.deepseek import MlaRecipe
from harness.models.published import PublishedRecipe
from harness.models.recipe import RECIPES, Recipe, ensure, shape
from harness.models.wide import wide

__all__ = [
    "RECIPES",
    "MlaRecipe",
    "MlaRetrievalRecipe",
    "PublishedRecipe",
    "Recipe",
    "RetrievalRecipe",
    "ensure",
    "shape",
    "wide",
]
