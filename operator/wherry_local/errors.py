"""The one error that the command line shows without a traceback."""


class LocalError(Exception):
    """Something the user can act on; the message says what to do."""
