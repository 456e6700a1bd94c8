"""Layouts of quantized checkpoints: each module here declares those that it reads, as `LAYOUT` or `LAYOUTS`."""

import importlib
import pkgutil
from typing import Any

from wherry_runtime.quantization.layouts.base import Kind, Layout, UnsupportedLayoutError


def known() -> dict[str, Layout]:
    """`quant_method` → layout."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    layouts: list[Layout] = [module.LAYOUT for module in modules if hasattr(module, "LAYOUT")]
    layouts += [layout for module in modules for layout in getattr(module, "LAYOUTS", ())]
    return {layout.method: layout for layout in layouts}


def kinds_of(config: Any) -> tuple[Kind, ...]:
    """What matrices look like in a checkpoint with this `quantization_config`.

    Raises:
        UnsupportedLayoutError: its method or a setting is not known.
    """
    layouts = known()
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in layouts:
        raise UnsupportedLayoutError(
            f"quantization method {method!r} is not supported; {', '.join(sorted(layouts))} are"
        )
    return layouts[method].kinds(config)
