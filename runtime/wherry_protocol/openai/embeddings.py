"""Embeddings as OpenAI defines them: https://platform.openai.com/docs/api-reference/embeddings."""

import base64
import os
from array import array
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema

from wherry_protocol.openai.requests import IDS, INT32, STRING, STRINGS, Checked, is_token_ids
from wherry_protocol.worker import EmbedRequest

MAX_INPUTS = 2048


def _inputs(value: Any) -> list[str | list[int]]:
    """Every shape of `input` as a list of texts or token id lists."""
    if isinstance(value, str) or (is_token_ids(value) and value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) or is_token_ids(one) for one in value):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of those")
    if len(value) > MAX_INPUTS:
        raise ValueError(f"has {len(value)} inputs; at most {MAX_INPUTS} go into one request")
    if (empty := next((place for place, one in enumerate(value) if not one), None)) is not None:
        raise ValueError(f"input {empty} is empty")
    return value


Inputs = Annotated[
    list[str | list[int]],
    BeforeValidator(_inputs),
    WithJsonSchema({"anyOf": [STRING, STRINGS, IDS, {"type": "array", "items": IDS, "maxItems": MAX_INPUTS}]}),
]


class EmbeddingRequest(Checked):
    """`POST /v1/embeddings`."""

    model: Annotated[str, Field(max_length=256)]
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=INT32)] | None = None
    user: str | None = None
    # Extension: tokens of each input at most, of its beginning; -1: as many as the model takes.
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32)] | None = None


def to_embed(request: EmbeddingRequest, request_id: str) -> EmbedRequest:
    """The worker's request."""
    return EmbedRequest(
        id=request_id,
        model=request.model,
        inputs=request.input,
        dimensions=request.dimensions,
        truncate=request.truncate_prompt_tokens,
    )


def encoded(index: int, vector: bytes, encoding: Literal["float", "base64"]) -> bytes:
    """One member of the answer's `data`, as JSON. `vector`: float32, little-endian."""
    if encoding == "base64":
        told = b'"%s"' % base64.b64encode(vector)
    else:
        numbers = array("f", vector)
        if not _LITTLE_ENDIAN:
            numbers.byteswap()
        told = msgspec.json.encode(numbers.tolist())
    return b'{"object":"embedding","index":%d,"embedding":%s}' % (index, told)


_LITTLE_ENDIAN = array("H", [1]).tobytes() == b"\x01\x00"


def whole(model: str, members: list[bytes], prompt_tokens: int) -> bytes:
    """The answer's body."""
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    parts = (msgspec.json.encode(model), b",".join(members), msgspec.json.encode(usage))
    return b'{"object":"list","model":%s,"data":[%s],"usage":%s}' % parts


def new_id() -> str:
    """Of a request."""
    return "embd-" + os.urandom(12).hex()
