"""Models and texts that are measured."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.quality.measure import Subject

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "models"
DATA = ROOT / "benchmarks" / "data"


def subject(directory: Path, length: int, threads: int = 1) -> Subject:
    """A model in the engine: float32 where weights are in no format of the engine's, KV cache in float32."""
    settings = {"dtype": "float32", "kv_cache_dtype": "float32", "threads": threads}
    return Subject(EngineConfig(model_name="m", model_uri=str(directory), **settings), length)


def linear_bytes(directory: Path) -> int:
    """What the matrices of the layers take in the files, scales and all."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            total += sum(shard.get_tensor(n).nbytes for n in shard.keys() if "_proj." in n)  # noqa: SIM118
    return total


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
