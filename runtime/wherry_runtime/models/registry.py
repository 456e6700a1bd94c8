"""Known architectures, and a checkpoint's `config.json` read with the right one."""

from pathlib import Path
from typing import Any

from wherry_runtime.loading.config import (
    ModelConfig,
    architecture_of,
    build_config,
    common_fields,
    read_json,
    token_ids,
)
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.gguf import raw_config
from wherry_runtime.loading.rope_config import rope_config
from wherry_runtime.models.families import modules
from wherry_runtime.models.family import Family

FAMILIES: dict[str, Family] = {
    name: module.FAMILY for module in modules() for name in (module.FAMILY.architecture, *module.FAMILY.also)
}


def read_config(directory: Path) -> ModelConfig:
    """The configuration of the checkpoint in `directory`.

    End-of-sequence ids come from `generation_config.json` where it names them, else from `config.json`.

    Raises:
        ModelError: missing_file, bad_json, unknown_architecture, bad_config or an unsupported setting.
    """
    raw, path = raw_config(directory)
    fields = config_fields(raw, path)
    generation = directory / "generation_config.json"
    if generation.is_file() and (stops := token_ids(read_json(generation).get("eos_token_id"))):
        fields["eos_token_ids"] = stops
    return build_config(fields, path)


def config_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `ModelConfig` from the content of `config.json`, not checked yet.

    Raises:
        ModelError: unknown_architecture, bad_config or an unsupported setting.
    """
    family = FAMILIES[architecture_of(raw, sorted(FAMILIES), path)]
    raw = family.common(raw)
    try:
        own = family.fields(raw)
        fields = {**common_fields(family.without_own_quantization(raw)), "rope": None}
        if family.rotary:
            fields["rope"] = rope_config(
                raw, theta=family.theta, partial=family.partial, interleaved=family.interleaved
            )
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
        raise ModelError("bad_config", f"{path}: a setting of {family.architecture} is missing or odd: {e}") from e
    except ModelError as e:
        raise ModelError(e.code, f"{path}: {e.message}") from e
    return {**fields, **own, "family": family.name, "architecture": family.architecture}
