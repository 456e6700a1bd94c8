"""`wherry local …`: a real control plane on this machine, with pods as local processes."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from wherry_local.components import Options
from wherry_local.errors import LocalError
from wherry_local.lifecycle import Cluster
from wherry_local.paths import cache_root, default_home, project_root

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console()


@contextlib.contextmanager
def _step(text: str) -> Iterator[None]:
    """One line per step, with the time it took."""
    began = time.monotonic()
    with console.status(f"{text} …"):
        yield
    console.print(f"[green]✓[/] {text} [dim]{time.monotonic() - began:.1f} s[/]")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Show what the user can act on, without a traceback."""
    try:
        yield
    except LocalError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def up(
    nodes: Annotated[int, typer.Option(min=1, max=99)] = 3,
    operator: Annotated[bool, typer.Option()] = True,
) -> None:
    """Start the cluster."""
    with _errors():
        cluster = Cluster(default_home())
        crds = sorted((project_root() / "crds").glob("*.yaml"))
        scale = float(os.environ.get("WHERRY_LOCAL_BACKOFF_SCALE", "1"))
        cluster.up(Options(nodes=nodes, operator=operator, backoff_scale=scale), cache_root() / "bin", crds, _step)
        console.print(f"export KUBECONFIG={cluster.home.kubeconfig}")


@app.command()
def down(purge: Annotated[bool, typer.Option()] = False) -> None:
    """End the cluster."""
    with _errors():
        Cluster(default_home()).down(purge=purge, progress=_step)
