"""Lists of checksums, as `sha256sum` writes them: https://www.gnu.org/software/coreutils/manual/html_node/cksum-output-modes.html."""

import re

from wherry_runtime.sources.types import TransferError

NAME = "SHA256SUMS"
MAX_BYTES = 4 << 20
_LINE = re.compile(r"([0-9a-fA-F]{64})  ?\*?(?:\./)?(.+)")


def parse(data: bytes, where: str) -> dict[str, str]:
    """SHA-256 in hexadecimal by file name.

    Raises:
        TransferError: bad_checksums, with the first line that is none.
    """
    found: dict[str, str] = {}
    for line in data.decode(errors="replace").splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise TransferError("bad_checksums", f"{where}: {line[:100]!r} is no line of `sha256sum`")
        found[match[2]] = match[1].lower()
    return found
