"""Rotary position embedding's settings in `config.json`."""

from typing import Annotated, Any, Literal, get_args

import msgspec

from wherry_runtime.loading.errors import ModelError

PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
SCALED = ("linear", "llama3")  # which need a factor
OLD_NAMES = {"su": "longrope"}


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding.

    `linear` divides positions by `factor`; `dynamic` is `default` up to the model's context, beyond which nothing is
    served; `llama3` is Llama 3.1's; `yarn` (https://arxiv.org/abs/2309.00071); `longrope`
    (https://arxiv.org/abs/2402.13753) takes its long factors when the served context is beyond the original one.

    Attributes:
        partial_rotary_factor: the part of each head that is rotated; the rest stays as it is.
        interleaved: pairs are neighbours (GPT-J), not halves (Llama).
        max_position_embeddings: the model's context, which the factors of yarn and longrope follow from where none is
            given.
    """

    rope_type: RopeType = "default"
    rope_theta: PositiveFloat = 10000.0
    factor: PositiveFloat = 1.0
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    interleaved: bool = False
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=1)] = 8192
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1)] = 8192
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[PositiveFloat, ...] = ()
    long_factor: tuple[PositiveFloat, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """Columns of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def order(self, head_dim: int) -> list[int] | None:
        """Which of the checkpoint's columns of a head comes where: so that those that rotate together are half a head
        apart, as every backend rotates them. None: they are already.

        Scores do not change, as queries and keys are put into the same order.
        """
        rotary = self.rotary_dim(head_dim)
        if rotary == head_dim and not self.interleaved:
            return None
        half, rest = rotary // 2, list(range(rotary, head_dim))
        first = list(range(0, rotary, 2)) if self.interleaved else list(range(half))
        second = list(range(1, rotary, 2)) if self.interleaved else list(range(half, rotary))
        middle = len(rest) // 2
        return first + rest[:middle] + second + rest[middle:]


def rope_config(
    raw: dict[str, Any], *, theta: float = 10000.0, partial: float = 1.0, interleaved: bool = False
) -> RopeConfig:
    """The rotary settings, as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) spells them.

    Args:
        theta, partial: the family's own, for a file that has none.

    Raises:
        ModelError: bad_config or unsupported_rope.
    """
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError("bad_config", f"rope: an object is expected, found {type(scaling).__name__}")
    given = {k: v for k, v in scaling.items() if v is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in get_args(RopeType):
        known = ", ".join(get_args(RopeType))
        raise ModelError("unsupported_rope", f"rope type {kind!r} is not supported; {known} are")
    context = raw.get("max_position_embeddings") or 8192
    defaults = {
        "rope_theta": raw.get("rope_theta") or theta,
        "partial_rotary_factor": raw.get("partial_rotary_factor") or partial,
        "original_max_position_embeddings": raw.get("original_max_position_embeddings") or context,
        "max_position_embeddings": context,
    }
    if kind in ("yarn", "longrope") and isinstance(context, int):
        original = given.get("original_max_position_embeddings") or defaults["original_max_position_embeddings"]
        defaults["factor"] = context / original if isinstance(original, int) and original > 0 else 1.0
    own = {f.name for f in msgspec.structs.fields(RopeConfig)}
    fields = {**defaults, **{k: v for k, v in given.items() if k in own}, "rope_type": kind, "interleaved": interleaved}
    try:
        config = msgspec.convert(fields, RopeConfig)
    except msgspec.ValidationError as e:
        raise ModelError("bad_config", f"rope: {e}") from e
    if kind in SCALED and "factor" not in given:
        raise ModelError("bad_config", f"rope: {kind} needs a factor")
    if kind == "longrope" and not (config.short_factor and len(config.short_factor) == len(config.long_factor)):
        raise ModelError("bad_config", "rope: longrope needs short_factor and long_factor, equally long")
    return config
