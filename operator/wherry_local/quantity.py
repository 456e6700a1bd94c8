"""Kubernetes quantities: `500m`, `2Gi`, `1e3`."""

from decimal import Decimal, InvalidOperation

_SUFFIXES = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def parse_quantity(text: str | float) -> Decimal:
    """The number that `text` stands for. Raises ValueError when it is no quantity."""
    value = str(text)
    try:
        if value[-2:] in _BINARY:
            return Decimal(value[:-2]) * Decimal(1024) ** _BINARY[value[-2:]]
        if value[-1:] in _SUFFIXES:
            return Decimal(value[:-1]).scaleb(_SUFFIXES[value[-1:]])
        return Decimal(value)
    except InvalidOperation as error:
        raise ValueError(f"{value!r} is not a quantity: write a number such as 2, 500m or 4Gi") from error
