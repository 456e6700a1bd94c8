"""When so many replicas look bad that the looking is more likely wrong than they are. Pure."""


def panics(replicas: int, out: int, share: float) -> bool:
    """Whether all `replicas` are to be used again though `out` of them look bad: more than `share`, or all."""
    return replicas > 0 and (out >= replicas or out > share * replicas)
