"""Fields of a GGUF file's metadata, checked."""

from typing import Any

from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.loading.errors import ModelError

Metadata = dict[str, Value]
Config = dict[str, Any]


class Fields:
    """Those of one architecture, `ARCHITECTURE.…`.

    Attributes:
        metadata: all there is.
    """

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self.metadata = metadata
        self._prefix = architecture

    def get(self, name: str, kind: type[Any], default: Any = None) -> Any:
        """A number, not negative.

        Raises:
            ModelError: bad_config, when it is something else, or neither there nor has a default.
        """
        value = self.metadata.get(f"{self._prefix}.{name}", default)
        if value is None:
            raise ModelError("bad_config", f"{self._prefix}.{name} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
            raise ModelError("bad_config", f"{self._prefix}.{name} is {value!r}; one positive number is expected")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """A switch.

        Raises:
            ModelError: bad_config, when it is something else.
        """
        value = self.metadata.get(f"{self._prefix}.{name}", default)
        if not isinstance(value, bool):
            raise ModelError("bad_config", f"{self._prefix}.{name} is {value!r}; true or false is expected")
        return value

    def text(self, name: str, default: str) -> str:
        """A word."""
        return str(self.metadata.get(f"{self._prefix}.{name}", default))

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return f"{self._prefix}.{name}" in self.metadata
