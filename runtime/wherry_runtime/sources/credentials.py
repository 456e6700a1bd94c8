"""Names, keys and addresses that sources need: entries of a mounted Secret, else the environment.

A Secret is read anew each time, so that a token that is renewed while a model loads is used.
"""

import os
from pathlib import Path

from wherry_protocol.naming import ENV_MODEL_SECRET


def credential(name: str) -> str | None:
    """The entry `name` of the Secret, else the variable `name`; None where neither has it."""
    if (directory := os.environ.get(ENV_MODEL_SECRET)) and (path := Path(directory) / name).is_file():
        return path.read_text().strip() or None
    return os.environ.get(name) or None
