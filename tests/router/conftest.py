"""One real worker and one `wherry serve` for every test that only talks to them."""

from collections.abc import Iterator

import pytest
from tests.router.harness import Process, router, serve, worker


@pytest.fixture(scope="session")
def tiny_worker() -> Iterator[Process]:
    """A real worker with the sample model. Tests must leave it idle and alive."""
    with worker("--max-running", "32", "--max-queued", "128") as process:
        yield process


@pytest.fixture(scope="session")
def tiny_router(tiny_worker: Process) -> Iterator[Process]:
    """A router in front of it."""
    with router(tiny_worker.url, args=("--max-body-bytes", "1000000", "--no-replica-wait-s", "0.5")) as process:
        yield process


@pytest.fixture(scope="session")
def tiny_serve() -> Iterator[Process]:
    """`wherry serve` with the sample model."""
    with serve() as process:
        yield process
