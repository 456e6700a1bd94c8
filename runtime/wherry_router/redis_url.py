"""Where Redis or Valkey is, without importing what speaks to it."""

import argparse
import os


def check(parser: argparse.ArgumentParser, variable: str) -> None:
    """Ends the program with a message where the environment's URL cannot be one. It is not shown: it may hold a
    password."""
    url = os.environ.get(variable)
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        parser.error(f"${variable} must begin with redis://, rediss:// or unix://")
