"""Known architectures, and a checkpoint's `config.json` read with the right one."""

from pathlib import Path

from wherry_runtime.loading.config import (
    ModelConfig,
    architecture_of,
    build_config,
    common_fields,
    read_json,
    token_ids,
)
from wherry_runtime.loading.gguf import raw_config
from wherry_runtime.models import llama, mistral, qwen2, qwen3

FAMILIES = {family.ARCHITECTURE: family for family in (llama, mistral, qwen2, qwen3)}


def read_config(directory: Path) -> ModelConfig:
    """The configuration of the checkpoint in `directory`.

    End-of-sequence ids come from `generation_config.json` where it names them, else from `config.json`.

    Raises:
        ModelError: missing_file, bad_json, unknown_architecture, bad_config or an unsupported setting.
    """
    raw, path = raw_config(directory)
    architecture = architecture_of(raw, sorted(FAMILIES), path)
    family = FAMILIES[architecture]
    fields = {**common_fields(raw, path), **family.fields(raw), "family": family.FAMILY, "architecture": architecture}
    generation = directory / "generation_config.json"
    if generation.is_file() and (stops := token_ids(read_json(generation).get("eos_token_id"))):
        fields["eos_token_ids"] = stops
    return build_config(fields, path)
