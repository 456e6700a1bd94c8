"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html, the part that Wherry speaks.

Every event is one `event:` line, one `data:` line of JSON and a blank line, so a reader needs no more than to split at
blank lines. Where an answer pauses for `HEARTBEAT_S`, a comment says that worker and connection are there; a worker
that does so promises it in the header `HEADER_HEARTBEAT`.
"""

import msgspec

from wherry_protocol.worker import Event, LoadUpdate

HEARTBEAT_S = 0.3
HEARTBEAT = b": alive\n\n"
HEADER_HEARTBEAT = "x-heartbeat-s"

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_load_decoder = msgspec.json.Decoder(LoadUpdate)
_TAGS = {t: t.__struct_config__.tag for t in Event.__args__}


def encode_event(event: Event) -> bytes:
    """One SSE frame."""
    return b"event: %s\ndata: %s\n\n" % (str(_TAGS[type(event)]).encode(), _encoder.encode(event))


def encode_load(update: LoadUpdate) -> bytes:
    """One SSE frame."""
    return b"event: load\ndata: %s\n\n" % _encoder.encode(update)


def decode_frame(frame: bytes) -> Event | None:
    """The event of one frame (without its blank line), or None for a comment.

    Raises:
        msgspec.ValidationError, msgspec.DecodeError: the data is not an event.
    """
    data = _data(frame)
    return None if data is None else _decoder.decode(data)


def decode_load(frame: bytes) -> LoadUpdate | None:
    """What one frame of `GET /load/watch` tells, or None for a comment. Raises as `decode_frame` does."""
    data = _data(frame)
    return None if data is None else _load_decoder.decode(data)


def _data(frame: bytes) -> bytes | None:
    if frame.startswith(b"data: "):
        return frame[6:]
    _, found, data = frame.partition(b"\ndata: ")
    return data if found else None


class Frames:
    """Splits a byte stream, cut anywhere, into frames. What is left of one at the stream's end: its sender died."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are whole with this piece of the stream."""
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        return whole
