"""API keys as a Secret names them. Pure. Of a key only its hash is kept; messages say where, never what.

An entry whose name ends with .yaml, .yml or .json describes one key, or several under `keys`; any other entry is a key
itself, or `sha256:` and its hash, and is called like the entry.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import yaml

from wherry_router.caller import Caller, LimitSet

PREFIX = "wk-"
MIN_KEY_CHARS = 16  # a key that was cut short while it was written must not become one that is easy to guess
MAX_KEY_CHARS = 512
MAX_KEYS = 10_000
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}")
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@/-]{0,126}[A-Za-z0-9])?")
# libyaml's, where it is: thousands of keys must not hold up the requests that run meanwhile.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What may be said of an unknown field: a word. Anything else may be a key that was put in the wrong place.
_WORD = re.compile(r"unknown field `([A-Za-z]{1,24})`")


class KeysError(Exception):
    """An entry that cannot be used. The message names the entry and says what is wrong, without its content."""


class _Entry(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    name: str = ""
    key: str = ""
    sha256: str = ""
    tenant: str = ""
    weight: float = 1.0
    priority_class: str = ""
    limits: LimitSet | None = None


class _Entries(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    keys: list[_Entry]


class KeySet:
    """Keys by the SHA-256 of what clients send. How long a look-up takes says nothing about any key."""

    def __init__(self, callers: Mapping[bytes, Caller] | None = None) -> None:
        self._callers = dict(callers or {})

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, digest: bytes) -> Caller | None:
        """Whose key has this SHA-256."""
        return self._callers.get(digest)


def new_key() -> str:
    """A key that nobody can guess: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str | bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def is_name(text: str) -> bool:
    """Whether a key or a tenant may be called so."""
    return _NAME.fullmatch(text) is not None


def read_keys(files: Iterable[tuple[str, bytes]]) -> KeySet:
    """The keys of a Secret's entries, as (name, content).

    Raises:
        KeysError: some entry cannot be used. None of them is then: half a set is nobody's wish.
    """
    callers: dict[bytes, Caller] = {}
    names: set[str] = set()
    for name, content in files:
        if name.startswith(PREFIX):
            raise KeysError("an entry is called like a key: the entry's name is the key's name, its content the key")
        for digest, caller in _read(name, content):
            if digest in callers:
                raise KeysError(f"{name}: the key of {caller.key!r} is the same as that of {callers[digest].key!r}")
            if caller.key in names:
                raise KeysError(f"{name}: there are two keys with the name {caller.key!r}")
            if len(callers) >= MAX_KEYS:
                raise KeysError(f"{name}: there are more than {MAX_KEYS} keys")
            callers[digest] = caller
            names.add(caller.key)
    return KeySet(callers)


def _read(file: str, content: bytes) -> list[tuple[bytes, Caller]]:
    stem, dot, ending = file.rpartition(".")
    if not dot or ending not in ("yaml", "yml", "json"):
        return [_plain(file, content)]
    try:
        document = yaml.load(content, _LOADER)  # noqa: S506 - a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: what is no text, and what looks like a date and is none.
        mark = getattr(error, "problem_mark", None)
        raise KeysError(f"{file}: not YAML or JSON{f' (line {mark.line + 1})' if mark else ''}") from None
    several = isinstance(document, dict) and "keys" in document
    try:
        entries = msgspec.convert(document, _Entries).keys if several else [msgspec.convert(document, _Entry)]
    except msgspec.ValidationError as error:
        raise KeysError(f"{file}: {_safe(str(error))}") from None
    for entry in entries:
        entry.name = entry.name or ("" if several else stem)
    return [_known(file, entry) for entry in entries]


def _safe(message: str) -> str:
    if "unknown field" not in message:
        return message
    word = _WORD.search(message)
    return f"there is no field `{word[1]}`" if word else "it has a field that is not known"


def _plain(file: str, content: bytes) -> tuple[bytes, Caller]:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        raise KeysError(f"{file}: a key is ASCII text") from None
    if text.startswith("sha256:"):
        return _known(file, _Entry(name=file, sha256=text.removeprefix("sha256:")))
    return _known(file, _Entry(name=file, key=text))


def _known(file: str, entry: _Entry) -> tuple[bytes, Caller]:
    if not is_name(entry.name):
        raise KeysError(
            f"{file}: a key's name is 1 to 128 letters, digits and ._@/-, with a letter or digit at its ends"
        )
    where = f"{file}: {entry.name!r}" if file != entry.name else file
    if bool(entry.key) == bool(entry.sha256):
        raise KeysError(f"{where}: give either `key` or `sha256`")
    if entry.key and not _KEY.fullmatch(entry.key):
        raise KeysError(f"{where}: a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters of ASCII, without spaces")
    if entry.sha256 and not _HASH.fullmatch(entry.sha256):
        raise KeysError(f"{where}: `sha256` is the key's SHA-256 as 64 digits of 0-9 and a-f")
    if entry.tenant and not is_name(entry.tenant):
        raise KeysError(f"{where}: `tenant` is 1 to 128 letters, digits and ._@/-")
    if not 0.001 <= entry.weight <= 1000:
        raise KeysError(f"{where}: `weight` is a number from 0.001 to 1000")
    caller = Caller(
        tenant=entry.tenant or entry.name,
        key=entry.name,
        weight=entry.weight,
        priority_class=entry.priority_class,
        limits=entry.limits,
    )
    return bytes.fromhex(entry.sha256) if entry.sha256 else hash_of(entry.key), caller
