"""Why a model cannot be loaded."""


class ModelError(Exception):
    """A model that cannot be loaded or served. `code` is for programs, `message` says what to do about it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
