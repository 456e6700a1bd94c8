"""`wherry keys`: API keys for the router."""

import sys
from typing import Annotated

import typer
import yaml

from wherry_router.identity.keys import KeysError, hash_of, is_name, new_key, read_keys

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make API keys.")


@app.callback()
def keys() -> None:
    """API keys for the router; the Secret gets their hashes only."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the key is called in logs and limits.")],
    tenant: Annotated[str, typer.Option(help="Whose it is; default: the name.")] = "",
    weight: Annotated[float, typer.Option(help="The tenant's share beside other tenants'.")] = 1.0,
    priority_class: Annotated[str, typer.Option(help="Class that its requests are queued as.")] = "",
    requests_per_minute: Annotated[int, typer.Option(help="0: no limit of its own.", min=0)] = 0,
    tokens_per_minute: Annotated[int, typer.Option(help="0: no limit of its own.", min=0)] = 0,
    concurrent: Annotated[int, typer.Option(help="Requests at a time; 0: no limit of its own.", min=0)] = 0,
) -> None:
    """Make a key. It goes to stdout and is kept nowhere; the entry for the Secret goes to stderr."""
    key = new_key()
    limits = {
        "requestsPerMinute": requests_per_minute,
        "tokensPerMinute": tokens_per_minute,
        "concurrent": concurrent,
    }
    fields = {
        "tenant": tenant if tenant != name else "",
        "weight": weight if weight != 1.0 else 0,
        "priorityClass": priority_class,
        "limits": {field: value for field, value in limits.items() if value},
    }
    described = {field: value for field, value in fields.items() if value}
    entry, text = name, f"sha256:{hash_of(key).hex()}"
    if described:
        entry, text = f"{name}.yaml", yaml.safe_dump({"sha256": text[7:], **described}, sort_keys=False)
    try:
        _check(name, entry, text)
    except KeysError as error:
        sys.stderr.write(f"wherry keys new: {error}\n")
        raise typer.Exit(2) from None
    sys.stdout.write(key + "\n")
    sys.stdout.flush()
    shown = f"  {entry}: {text}" if entry == name else "\n".join([f"  {entry}: |", *_indented(text)])
    sys.stderr.write(f"\nThe key is above; it is kept nowhere. Put this into the Secret:\n\nstringData:\n{shown}\n")


def _check(name: str, entry: str, text: str) -> None:
    # Names of a Secret's entries are more narrow than those of keys.
    if "/" in name or "@" in name or not is_name(name):
        raise KeysError("NAME becomes a Secret's entry: letters, digits, '.', '_' and '-' only")
    read_keys([(entry, text.encode())])


def _indented(text: str) -> list[str]:
    return ["    " + line for line in text.splitlines()]
