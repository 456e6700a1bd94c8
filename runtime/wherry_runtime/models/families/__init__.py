"""Architectures: each module here declares one, as `FAMILY`."""

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """All of them, in the order of their names."""
    return [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
