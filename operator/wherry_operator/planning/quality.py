"""What rounding cost a model, from what its workers answer to probes. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from wherry_operator.api.v1alpha1 import Quantization, QuantizationStatus
from wherry_operator.planning.pods import PodView, Quality
from wherry_operator.planning.types import Observed

LONGEST = 200  # characters of a worker's reason


class _Health(msgspec.Struct):
    quality: Quality | None = None


_decode = msgspec.json.Decoder(_Health).decode


def quality_of(health: bytes) -> Quality | None:
    """What `GET /health` says of it; None: nothing."""
    try:
        return _decode(health).quality
    except msgspec.MsgspecError:
        return None


def with_qualities(observed: Observed, qualities: Mapping[str, Quality]) -> Observed:
    """The snapshot, with what its pods measured, by their uids."""
    pods = tuple(replace(pod, quality=qualities.get(pod.uid)) for pod in observed.pods)
    return replace(observed, pods=pods)


def quantization_status(
    pods: Sequence[PodView], revision: str, wanted: Quantization, previous: dict[str, object] | None
) -> QuantizationStatus | None:
    """What the status says of it; None where nothing is rounded.

    Replicas of a revision are rounded alike, so any one's figures are all's. While none of them tells anything, as
    after an operator's start, what was told before stays, if it is about the same pods' template.
    """
    method = wanted.method
    if method == "none":
        return None
    if not wanted.measure:
        return QuantizationStatus(
            method=method, revision=revision, message="not measured: spec.quantization.measure is false"
        )
    found = [pod.quality for pod in pods if pod.revision == revision and pod.quality is not None]
    told = next((q for q in found if q.divergence is not None), found[0] if found else None)
    if told is None:
        if previous is not None and previous.get("revision") == revision:
            return QuantizationStatus.model_validate(previous)
        return QuantizationStatus(method=method, revision=revision, message="not measured yet")
    if told.divergence is None or told.change is None:
        why = told.error[:LONGEST] or "the worker does not say why"
        return QuantizationStatus(method=method, revision=revision, message=f"not measured: {why}")
    return QuantizationStatus(
        method=method,
        revision=revision,
        divergence=f"{told.divergence:.6f}",
        perplexity_change=f"{told.change:+.2%}",
        tokens=told.tokens,
        message=f"{told.divergence:.4f} nats per token from the model as it was, over {told.tokens} tokens of a "
        "built-in text",
    )
