"""The shape of an encoder, where it differs from a decoder's."""

from typing import Annotated

import msgspec


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A bidirectional encoder, whose last layer's rows are pooled to one vector for each text.

    Attributes:
        token_types: rows of the table of token types, of which texts that come alone have the first; 0: no table.
        heads: beginnings of names of what the checkpoint has for other tasks, which no vector needs.
    """

    token_types: Annotated[int, msgspec.Meta(ge=0)] = 0
    heads: tuple[str, ...] = ()
