"""Asks workers for their load."""

from collections.abc import Sequence

import msgspec

from wherry_operator.autoscaling.decide import Signal
from wherry_operator.cluster.asking import ask
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.types import WorkerClient
from wherry_protocol import naming
from wherry_protocol.worker import LoadReport

MAX_BYTES = 65536

_decoder = msgspec.json.Decoder(LoadReport)


async def poll(pods: Sequence[PodView], token: str | None, workers: WorkerClient | None = None) -> list[Signal | None]:
    """One signal for every pod, in order; None where a worker does not answer as it should.

    Those with mutual TLS are asked as `workers` says, and without it not at all.
    """
    reports = await ask(pods, naming.WORKER_PORT, "/load", token, _decoder, MAX_BYTES, workers)
    return [None if report is None else _signal(report) for report in reports]


def _signal(report: LoadReport) -> Signal:
    share = report.kv_tokens_used / report.kv_tokens_total if report.kv_tokens_total else 0.0
    return Signal(report.running + report.waiting, share)
