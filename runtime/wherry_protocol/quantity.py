"""Kubernetes quantities: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/."""

import re
from decimal import Decimal

_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def parse_quantity(text: str | float) -> Decimal:
    """`text` in base units: `1.5Gi` is 1610612736, `250m` is 0.25.

    Raises:
        ValueError: the text is not a quantity.
    """
    value = str(text)
    number, scale = value, Decimal(1)
    if value[-2:] in _BINARY:
        number, scale = value[:-2], Decimal(1024) ** _BINARY[value[-2:]]
    elif value[-1:] in _DECIMAL:
        number, scale = value[:-1], Decimal(10) ** _DECIMAL[value[-1:]]
    if not _NUMBER.fullmatch(number):
        raise ValueError(f"{value!r} is not a quantity: write it like 500m, 2, 512Mi or 16Gi")
    return Decimal(number) * scale
