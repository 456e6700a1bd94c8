"""Which requests may be answered with the answer of another one that means the same, and what of them must be equal."""

import hashlib
import re

import msgspec

from wherry_protocol.worker import ChatMessage, ExecuteRequest, Prompt
from wherry_router.response_cache.cache import decides

# With the sign or operator before it: 2 + 3 is not 2 - 3.
_NUMBERS = re.compile(r"[-+*/^<>=]?\s*\d+(?:[.,:/-]\d+)*%?")
_pack = msgspec.msgpack.Encoder().encode


class Question(msgspec.Struct, frozen=True):
    """What is compared by meaning, and `group`: the name of all the rest, which must be equal."""

    text: str
    group: bytes


def question_of(request: ExecuteRequest, version: str, max_chars: int) -> Question | None:
    """The question of a chat: its last turn, if that is the user's.

    None: it is found by its exact words or not at all. So is a text without turns, as nobody knows where its question
    begins; a turn of more than `max_chars`, of which an embedding may see a part only; and whatever asks for log
    probabilities, which are those of the exact words.

    The group holds everything else that decides the answer, the tenant's salt among it, and the numbers in the
    question: "in 2019" and "in 2020" mean nearly the same to an embedding.

    Args:
        version: of what answers and of what embeds.
    """
    messages = request.prompt.messages
    if not messages or messages[-1].role != "user" or request.sampling.logprobs is not None:
        return None
    last = messages[-1]
    text = last.content.strip()
    if not text or len(text) > max_chars:
        return None
    turns = [*messages[:-1], ChatMessage(role="user", content="", name=last.name)]
    rest = msgspec.structs.replace(decides(request), prompt=Prompt(messages=turns))
    numbers = ["".join(number.split()) for number in _NUMBERS.findall(text)]
    return Question(text, hashlib.sha256(_pack((version, rest, numbers))).digest())
