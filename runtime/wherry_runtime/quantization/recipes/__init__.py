"""Methods of quantizing a checkpoint: each module here declares one, as `RECIPE`."""

import importlib
import pkgutil

from wherry_runtime.quantization.recipes.base import Recipe


def known() -> dict[str, Recipe]:
    """Name → method."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    recipes: list[Recipe] = [module.RECIPE for module in modules if hasattr(module, "RECIPE")]
    return {recipe.name: recipe for recipe in recipes}
