"""`wherry pull`: a model into the cache, for the next `wherry serve` or for pods that share it."""

import sys
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer

from wherry_cli.download import download
from wherry_protocol.http.logs import set_up
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources.registry import REMOTE, is_remote
from wherry_runtime.sources.store import cache_root


def app(
    uri: Annotated[
        str,
        typer.Argument(
            help="hf://ORG/NAME[@REVISION][/FILE.gguf], s3://BUCKET/PREFIX, https://HOST/FILE.gguf#sha256=HEX or "
            "oci://REGISTRY/REPOSITORY:TAG."
        ),
    ],
    model_cache: Annotated[
        str,
        typer.Option(help="Directory of downloaded models; empty: $WHERRY_MODEL_CACHE, else ~/.cache/wherry/models."),
    ] = "",
) -> None:
    """Download a model and check it. Its path goes to stdout."""
    set_up(level=30, for_people=True)
    if not is_remote(uri):
        sys.stderr.write(f"wherry pull: {uri} is not downloaded; {', '.join(f'{s}://' for s in REMOTE)} are\n")
        raise typer.Exit(2)
    try:
        found = download(uri, cache_root(model_cache))
    except ModelError as error:
        sys.stderr.write(f"wherry pull: {error.message}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("wherry pull: stopped; the next one goes on from here\n")
        raise typer.Exit(130) from None
    sys.stdout.write(unquote(urlsplit(found).path) + "\n")
