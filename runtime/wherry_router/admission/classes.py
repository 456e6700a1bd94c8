"""Priority classes: what requests are queued as, and which class a caller may name."""

import re
from collections.abc import Sequence

import msgspec

from wherry_protocol.openai.errors import ApiError, invalid
from wherry_router.caller import Caller

HEADER = b"x-wherry-priority"
MAX_PRIORITY = 1_000_000
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


class PriorityClass(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that are queued together.

    Attributes:
        name: what clients name it by.
        priority: higher ones go first, here and in the engine, where they pause what runs of lower ones.
        max_queued_requests: requests of it that may wait in one router; None: the queue's bound alone.
        max_queued_tokens: their tokens, estimated, likewise.
        default: whether requests that name no class are of this one.
    """

    name: str
    priority: int = 0
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    default: bool = False


class Classes:
    """All classes of a router, from the highest priority to the lowest. Without any there is one, called `default`.

    Raises:
        ValueError: a name or a priority is wrong or twice there, or not exactly one class is the default.
    """

    def __init__(self, classes: Sequence[PriorityClass] = ()) -> None:
        classes = classes or (PriorityClass(name="default", default=True),)
        for one in classes:
            if not _NAME.fullmatch(one.name):
                raise ValueError(f"{one.name!r} is no name: at most 63 of a-z, 0-9 and '-', beginning with a letter")
            if abs(one.priority) > MAX_PRIORITY:
                raise ValueError(f"priority {one.priority} of {one.name} is not within ±{MAX_PRIORITY}")
            if min(one.max_queued_requests or 0, one.max_queued_tokens or 0) < 0:
                raise ValueError(f"a bound of {one.name} is negative")
        if len({one.name for one in classes}) < len(classes):
            raise ValueError("two priority classes have one name")
        if len({one.priority for one in classes}) < len(classes):
            raise ValueError("two priority classes have one priority")
        defaults = [one for one in classes if one.default]
        if len(defaults) != 1:
            raise ValueError("exactly one priority class must be the default")
        self.all = tuple(sorted(classes, key=lambda one: -one.priority))
        self.default = self.all.index(defaults[0])
        self._index = {one.name: index for index, one in enumerate(self.all)}

    def of(self, asked: bytes | None, caller: Caller) -> int:
        """The index in `all` of the class of a request.

        A caller with a class gets that or a lower one. One that is known by a key and has none may not go above the
        default. Where the router asks nobody who they are, all may name every class.

        Args:
            asked: the value of the request's header, if it has one.

        Raises:
            ApiError: 400 for a name that no class has, 403 for a class above the caller's.
        """
        own = self._index.get(caller.priority_class, self.default)
        if asked is None:
            return own
        index = self._index.get(asked.decode("latin-1"))
        if index is None:
            known = ", ".join(one.name for one in self.all)
            raise invalid(f"`{HEADER.decode()}` is one of: {known}.", HEADER.decode(), "unknown_priority_class")
        known_caller = bool(caller.priority_class or caller.key or caller.tenant)
        if known_caller and index < own:
            message = f"This caller may ask for `{self.all[own].name}` and lower classes."
            raise ApiError(403, "priority_not_allowed", message, param=HEADER.decode())
        return index


def parse_class(text: str) -> PriorityClass:
    """`name=high,priority=100,max-queued-requests=200,max-queued-tokens=100000,default` as a class.

    Raises:
        ValueError: it is not of that form.
    """
    fields: dict[str, str | int | bool] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        name = key.replace("-", "_")
        if name not in PriorityClass.__struct_fields__ or name in fields:
            raise ValueError(
                f"{part!r} is not one of name=, priority=, max-queued-requests=, max-queued-tokens=, default"
            )
        if name == "default":
            if value not in ("", "true", "false"):
                raise ValueError(f"{part!r} is neither true nor false")
            fields[name] = value != "false"
        else:
            fields[name] = value if name == "name" else int(value)
    if not fields.get("name"):
        raise ValueError(f"{text!r} has no name")
    return PriorityClass(**fields)  # type: ignore[arg-type]
