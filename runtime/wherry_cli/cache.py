"""`wherry cache`: the models that were downloaded."""

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from wherry_runtime.sources.progress import size_text
from wherry_runtime.sources.store import Cached, cache_root, cached, remove

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Show and remove downloaded models.")
_Root = Annotated[
    str, typer.Option(help="Directory of downloaded models; empty: $WHERRY_MODEL_CACHE, else ~/.cache/wherry/models.")
]


@app.callback()
def cache() -> None:
    """The models that were downloaded."""


@app.command("ls")
def list_(model_cache: _Root = "") -> None:
    """List the whole models, the one that was used longest ago first."""
    found = sorted(cached(cache_root(model_cache)), key=lambda model: model.used)
    rows = [("MODEL", "SIZE", "LAST USED (UTC)")]
    for model in found:
        used = datetime.fromtimestamp(model.used, UTC).strftime("%Y-%m-%d %H:%M")
        rows.append((_name(model), size_text(model.size), used))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, size, used in rows:
        sys.stdout.write(f"{name:{widths[0]}}  {size:>{widths[1]}}  {used}\n")


@app.command("rm")
def remove_(
    names: Annotated[list[str], typer.Argument(help="Models as `ls` shows them; without @REVISION: all revisions.")],
    model_cache: _Root = "",
) -> None:
    """Remove models. A worker that runs with one keeps it until it ends."""
    root = cache_root(model_cache)
    models = list(cached(root))
    for name in names:
        chosen = [model for model in models if name in (_name(model), model.source)]
        if not chosen:
            sys.stderr.write(f"wherry cache rm: there is no {name}; `wherry cache ls` shows what there is\n")
            raise typer.Exit(1)
        for model in chosen:
            remove(model)
            sys.stdout.write(f"removed {_name(model)}, {size_text(model.size)}\n")


def _name(model: Cached) -> str:
    return f"{model.source}@{model.revision}" + (f"/{model.entry}" if model.entry else "")
