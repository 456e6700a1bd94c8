"""Which of a repository's files a model needs: its weights once, in one format, and what describes them."""

import re
from collections.abc import Collection

from wherry_runtime.sources.types import TransferError

# Beside the weights. What is not here, like code and pictures, is not downloaded.
_DESCRIBING = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
_POOLING = re.compile(r"[^/]+_Pooling/config\.json")  # of sentence embeddings
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.safetensors|\.gguf)")
INDEX = "model.safetensors.index.json"
_MANY = 8  # names in a message


def select(paths: Collection[str], inside: str = "") -> tuple[list[str], str]:
    """The files to download and, where that is a file, the model's entry (a GGUF; the first one of several shards).

    Args:
        paths: every file, with slashes.
        inside: what the URI names in the repository: nothing, a directory or a file.

    Raises:
        TransferError: model_not_found; or ambiguous_model, with the names to choose from; or unsupported_format.
    """
    if inside and inside in paths:
        if not inside.endswith(".gguf"):
            raise TransferError(
                "unsupported_format", f"{inside}: a file that is a whole model is a .gguf; else name its directory"
            )
        return _shards(paths, inside), _shards(paths, inside)[0]
    prefix = f"{inside}/" if inside else ""
    names = {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}
    if not names:
        raise TransferError("model_not_found", f"there is no {inside!r}" if inside else "there are no files")
    chosen, entry = _choose(names, prefix)
    return [prefix + name for name in chosen], prefix + entry if entry else ""


def _choose(names: set[str], prefix: str) -> tuple[list[str], str]:
    top = {name for name in names if "/" not in name}
    describing = {name for name in top if name.endswith(_DESCRIBING)} | {n for n in names if _POOLING.fullmatch(n)}
    if weights := _safetensors(top):
        # Indexes of other formats name files that are not there.
        describing = {name for name in describing if not name.endswith(".bin.index.json")}
        return sorted(weights | describing), ""
    if ggufs := {name for name in top if name.endswith(".gguf")}:
        firsts = sorted({_shards(ggufs, name)[0] for name in ggufs})
        if len(firsts) > 1:
            shown = ", ".join(prefix + name for name in firsts[:_MANY]) + (", …" if len(firsts) > _MANY else "")
            raise TransferError("ambiguous_model", f"several GGUF files are there; name one in the URI: {shown}")
        return _shards(ggufs, firsts[0]), firsts[0]
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in top):
        raise TransferError(
            "unsupported_format",
            "the weights are PyTorch pickles and no safetensors, and are not downloaded; take a repository with "
            "safetensors or GGUF, or convert them",
        )
    raise TransferError("model_not_found", "there are no weights: neither .safetensors nor .gguf")


def _safetensors(top: set[str]) -> set[str]:
    """One set of weights: the sharded one that an index names, else the one file, else all there are."""
    found = {name for name in top if name.endswith(".safetensors")}
    if INDEX in top and (shards := {n for n in found if (m := _SHARD.fullmatch(n)) and m[1] == "model"}):
        return shards
    if "model.safetensors" in found:
        return {"model.safetensors"}
    # Mistral's own format lies beside the same weights in the usual one.
    return {name for name in found if not name.startswith("consolidated")} or found


def _shards(paths: Collection[str], name: str) -> list[str]:
    """All files of a GGUF that may be in several."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return [name]
    same = [path for path in paths if (m := _SHARD.fullmatch(path)) and m.groups() == found.groups()]
    if len(same) != int(found[2]):
        raise TransferError("model_not_found", f"{name}: {len(same)} of its {int(found[2])} shards are there")
    return sorted(same)
