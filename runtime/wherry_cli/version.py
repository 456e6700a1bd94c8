"""`wherry version`."""

from importlib.metadata import version

import typer


def app() -> None:
    """Print the version."""
    typer.echo(f"wherry {version('wherry')}")
