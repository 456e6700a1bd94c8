"""The router's flags about who may use it."""

import argparse
import os
from pathlib import Path

from wherry_router.identity.gate import Gate, KeyFiles

ENV_API_KEY = "WHERRY_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of this module."""
    parser.add_argument(
        "--api-keys", type=Path, help="directory (a mounted Secret) or file with API keys; followed as it changes"
    )
    parser.add_argument("--oidc-issuer", type=_issuer, help="accept tokens (JWT) of this issuer: a URL, as in `iss`")
    parser.add_argument("--oidc-audience", help="what tokens must have in `aud`; needed with --oidc-issuer")
    parser.add_argument(
        "--oidc-tenant-claim", default="sub", help="the claim that names a token's tenant (default: %(default)s)"
    )


def _issuer(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise argparse.ArgumentTypeError(f"{text} is no https:// URL")
    return text


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where flags do not fit together."""
    if bool(args.oidc_issuer) != bool(args.oidc_audience):
        parser.error("--oidc-issuer and --oidc-audience go together: a token for somebody else must not open this door")


def make_gate(args: argparse.Namespace, open_paths: frozenset[bytes]) -> Gate:
    """The gate that the flags and $WHERRY_API_KEY ask for."""
    issuer = None
    if args.oidc_issuer:
        # Imported late: cryptography takes a while, and most routers have no issuer.
        from wherry_router.identity.oidc import Issuer, OidcSettings

        issuer = Issuer(
            OidcSettings(issuer=args.oidc_issuer, audience=args.oidc_audience, tenant_claim=args.oidc_tenant_claim)
        )
    files = KeyFiles(args.api_keys) if args.api_keys else None
    return Gate(open_paths, os.environ.get(ENV_API_KEY), files, issuer)
