"""What a source says of a model, and what went wrong on the way to it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Algorithm = Literal["sha256", "git-sha1", "md5"]


class TransferError(Exception):
    """A request that failed. The message holds no secrets: URLs are told without user, query and fragment.

    Attributes:
        code: for programs, as in `ModelError`.
        retry: whether the same request may succeed later.
        after_s: seconds to wait before it, as the server said; None: it did not.
        unreachable: nobody answered, so what is in the cache may be used instead.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry: bool = False,
        after_s: float | None = None,
        unreachable: bool = False,
    ) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.retry, self.after_s, self.unreachable = retry, after_s, unreachable


@dataclass(frozen=True)
class Checksum:
    """What the bytes of a file must come to. `git-sha1` is the id of a git blob: of its size, and them."""

    algorithm: Algorithm
    value: str

    def hasher(self, size: int | None) -> Any:
        """A hash object to feed the bytes of a file of `size` bytes to."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        # These two are what the source has; they find what broke on the way, and claim no more than that.
        if self.algorithm == "md5":
            return hashlib.md5(usedforsecurity=False)
        found = hashlib.sha1(usedforsecurity=False)
        found.update(f"blob {size}\0".encode())
        return found


@dataclass(frozen=True)
class Request:
    """How a file is asked for: a GET. `headers` may hold credentials, which go to this origin only."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model.

    Attributes:
        path: relative to the model's directory, with slashes.
        size: in bytes; None where the source does not tell.
        checksum: None where the source has none; then the size is all there is to check.
        request: makes the request anew for each try, as credentials in it may expire.
    """

    path: str
    size: int | None
    checksum: Checksum | None
    request: Callable[[], Request]


@dataclass(frozen=True)
class Listing:
    """The files of one revision.

    Attributes:
        revision: names these very bytes: a commit, a digest.
        entry: the file that the URI names, as a GGUF; empty: the model is the directory.
        prepare: finds out what else there is to know of a file, before it is downloaded.
        finish: makes the model out of the files once they are in the directory given, and says what it is then.
    """

    revision: str
    files: tuple[RemoteFile, ...]
    entry: str = ""
    prepare: Callable[[RemoteFile], RemoteFile] = lambda file: file
    finish: "Callable[[Path], Listing] | None" = None


class Source(Protocol):
    """One model at one place.

    Attributes:
        identity: names the model in the cache, whatever the revision.
        reference: the revision as the URI has it, with the path inside it.
        pinned: the revision, where the URI says it by itself; else None, and `resolve` finds out.
    """

    identity: str
    reference: str
    pinned: str | None

    def resolve(self) -> Listing:
        """Asks which files there are.

        Raises:
            TransferError: they cannot be had; with `retry`, now.
            ModelError: the URI or what it leads to is no model that can be used.
        """
