"""What the ranks of a group say to one another: MessagePack (https://msgpack.org) in a fixed schema, framed by length.

A connection begins with a handshake in which each side shows that it knows the group's secret (HMAC-SHA256 of nonces
of both, RFC 2104), unless it was inherited from the process that made both ends:

    rank: Hello      leader: Challenge      rank: Proof      leader: Welcome | Refused

After it the leader says what the next step is (Prepare, ahead of its tokens) and when it begins (Go), and both sides
beat, so that a silent peer is a frozen one.
"""

import contextlib
import hashlib
import hmac
import socket
import struct
import threading

import msgspec

# A step of 2048 tokens and 256 long block tables has some 10 MB at the very most.
MAX_FRAME = 64 << 20
MAX_HANDSHAKE_FRAME = 4096
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, array_like=True, tag="hello", frozen=True):
    """A rank asks to join. `settings`: a digest of what all ranks must agree on."""

    group: str
    rank: int
    size: int
    settings: str
    nonce: bytes


class Challenge(msgspec.Struct, array_like=True, tag="challenge", frozen=True):
    """The leader shows that it is one, and asks the same of the rank."""

    epoch: int
    nonce: bytes
    mac: bytes


class Proof(msgspec.Struct, array_like=True, tag="proof", frozen=True):
    """The rank's answer."""

    mac: bytes


class Welcome(msgspec.Struct, array_like=True, tag="welcome", frozen=True):
    """The rank is in the group of this epoch."""

    epoch: int


class Refused(msgspec.Struct, array_like=True, tag="refused", frozen=True):
    """The rank is not; why."""

    reason: str


class Loaded(msgspec.Struct, array_like=True, tag="loaded", frozen=True):
    """The rank's weights are there."""


class Measure(msgspec.Struct, array_like=True, tag="measure", frozen=True):
    """Everybody's weights are there: how much room is left?"""


class Room(msgspec.Struct, array_like=True, tag="room", frozen=True):
    """For so many KV cache blocks."""

    num_blocks: int


class Build(msgspec.Struct, array_like=True, tag="build", frozen=True):
    """Every rank's KV cache is to have so many blocks. `store`: where torch.distributed meets, if it is to."""

    num_blocks: int
    store: tuple[str, int] | None = None


class Built(msgspec.Struct, array_like=True, tag="built", frozen=True):
    """The rank is ready for steps."""


class Range(msgspec.Struct, array_like=True, frozen=True):
    """`SequenceStep` without what only the first rank needs. `blocks`: int32, little-endian."""

    tokens: list[int]
    start: int
    blocks: bytes
    samples: bool


class Prepare(msgspec.Struct, array_like=True, tag="prepare", frozen=True):
    """A step to come. Tokens that the step before it draws are UNKNOWN."""

    step: int
    ranges: list[Range]


class Go(msgspec.Struct, array_like=True, tag="go", frozen=True):
    """The step begins; `tokens` take the place of the UNKNOWN ones, in order. Steps that were skipped never will."""

    step: int
    tokens: list[int]


class Scrub(msgspec.Struct, array_like=True, tag="scrub", frozen=True):
    """KV cache blocks to be zeroed."""

    blocks: list[int]


class Beat(msgspec.Struct, array_like=True, tag="beat", frozen=True):
    """Alive."""


class Fault(msgspec.Struct, array_like=True, tag="fault", frozen=True):
    """The sender ends, and the group with it; why."""

    code: str
    message: str


class Stop(msgspec.Struct, array_like=True, tag="stop", frozen=True):
    """The leader ends as it should."""


Handshake = Hello | Challenge | Proof | Welcome | Refused
Message = Loaded | Measure | Room | Build | Built | Prepare | Go | Scrub | Beat | Fault | Stop

_encode = msgspec.msgpack.Encoder().encode
_messages: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_handshakes: msgspec.msgpack.Decoder[Handshake] = msgspec.msgpack.Decoder(Handshake)


class WireError(Exception):
    """The other side closed the connection, or sent what is not in the schema."""


class Link:
    """One connection. `send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: Message | Handshake) -> None:
        """Sends whole messages, in the order of the calls; blocks while the other side's buffer is full.

        Raises:
            WireError: the connection is gone.
        """
        payload = _encode(message)
        try:
            with self._lock:
                self._sock.sendall(_LENGTH.pack(len(payload)) + payload)
        except OSError as e:
            raise WireError(str(e)) from e

    def beat(self) -> None:
        """Sends a `Beat`, unless something else is just being sent, which says as much."""
        frame = _LENGTH.pack(len(_BEAT)) + _BEAT
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._sock.send(frame, socket.MSG_DONTWAIT) != len(frame):
                raise WireError("the other side reads nothing")
        except BlockingIOError:
            pass  # its buffer is full; it will be found silent
        except OSError as e:
            raise WireError(str(e)) from e
        finally:
            self._lock.release()

    def receive(self) -> Message:
        """The next message.

        Raises:
            WireError: there is none.
        """
        try:
            return _messages.decode(self._frame(MAX_FRAME))
        except msgspec.DecodeError as e:
            raise WireError(f"not a message of a group: {e}") from e

    def handshake(self) -> Handshake:
        """The next message of a connection that is not trusted yet.

        Raises:
            WireError: there is none, or it does not come before the socket's timeout.
        """
        try:
            return _handshakes.decode(self._frame(MAX_HANDSHAKE_FRAME))
        except msgspec.DecodeError as e:
            raise WireError(f"not a handshake of a group: {e}") from e

    def trust(self) -> None:
        """The handshake is over: from now on `receive` waits for as long as it takes."""
        self._sock.settimeout(None)

    def close(self) -> None:
        """Ends the connection, also for a thread that is receiving."""
        with contextlib.suppress(OSError):  # it was gone already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _frame(self, limit: int) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > limit:
            raise WireError(f"a message of {length} bytes, where {limit} are allowed")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._sock.recv(count - len(parts))
            except OSError as e:
                raise WireError(str(e)) from e
            if not part:
                raise WireError("the other side closed the connection")
            parts += part
        return bytes(parts)


_BEAT = _encode(Beat())


def leader_mac(secret: bytes, hello: Hello, epoch: int, nonce: bytes) -> bytes:
    """By which the leader shows a rank that it knows the secret."""
    return _mac(secret, b"leader", hello, epoch, nonce)


def rank_mac(secret: bytes, hello: Hello, epoch: int, nonce: bytes) -> bytes:
    """By which a rank shows it to the leader."""
    return _mac(secret, b"rank", hello, epoch, nonce)


def _mac(secret: bytes, role: bytes, hello: Hello, epoch: int, nonce: bytes) -> bytes:
    return hmac.digest(secret, role + _encode(hello) + _encode([epoch, nonce]), hashlib.sha256)
