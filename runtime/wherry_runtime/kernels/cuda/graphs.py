"""Steps that are recorded once and replayed: CUDA graphs."""

from collections.abc import Callable, Sequence

import torch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """The buckets for steps of up to `rows` rows, as far as there are any; the largest may be larger."""
    return tuple(b for i, b in enumerate(BUCKETS) if i == 0 or BUCKETS[i - 1] < rows)


class Direct:
    """Computes a step whenever it is asked for: where there are no graphs, and to test what goes into them."""

    def __init__(self, compute: Callable[[int], torch.Tensor]) -> None:
        self._compute = compute

    def replay(self, bucket: int) -> torch.Tensor:
        """What `compute` returns for a bucket."""
        return self._compute(bucket)


class Graphs:
    """A graph for each bucket.

    Args:
        compute: bucket → the step's result. It must launch the same work whenever it is called with a bucket, over the
            same memory; it is called with input for no sequence at all.
        buckets: recorded from the largest down, so that the smaller ones find their memory among what it has used.
    """

    def __init__(self, compute: Callable[[int], torch.Tensor], buckets: Sequence[int]) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        for bucket in sorted(buckets, reverse=True):
            # Kernels are compiled and libraries set up by a call that is not recorded.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                compute(bucket)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = compute(bucket)
            self._graphs[bucket] = (graph, result)
        torch.cuda.synchronize()

    def replay(self, bucket: int) -> torch.Tensor:
        """Runs a bucket's work again, on what its memory now has; the result is valid until the next call."""
        graph, result = self._graphs[bucket]
        graph.replay()
        return result
