"""Path replacement: what stands in for mount namespaces. Pure, no I/O.

A container that names a path under one of its mounts is given the volume's real directory in its place, in its
command, its arguments and the values of its environment. Paths that a program makes up by itself are not seen.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# A path begins at the start of the text or after one of these (or after `://`), and ends at one of those.
_BEFORE = r"(?:(?<![^=:,;\"'\s(<>|&`])|(?<=://))"
_AFTER = r"(?=$|[/=:,;\"'\s)<>|&?#`])"


@dataclass(frozen=True)
class Paths:
    """`real` gives for each mount path the directory or file that holds its content."""

    real: Mapping[str, str]

    def replace(self, text: str) -> str:
        """`text` with every path under a mount replaced; the longest mount path wins."""
        if not self.real:
            return text
        mounts = sorted(self.real, key=len, reverse=True)
        pattern = _BEFORE + "(" + "|".join(re.escape(mount) for mount in mounts) + ")" + _AFTER
        return re.sub(pattern, lambda match: self.real[match[1]], text)


_REFERENCE = re.compile(r"\$(?:\$|\(([-._a-zA-Z0-9]+)\))")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)` expansion: unknown names stay as they are, `$$` is a dollar sign."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)
