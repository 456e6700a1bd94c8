"""Local clusters that tests share."""

from collections.abc import Iterator

import pytest
from tests.local.harness import TestCluster, eventually, local_cluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[TestCluster]:
    with local_cluster(nodes=2, operator=False, backoff_scale=0.05) as running:
        running.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=30s")
        yield running


@pytest.fixture
def cluster(shared_cluster: TestCluster) -> Iterator[TestCluster]:
    """The shared cluster, whole at the start of each test and emptied at its end."""
    shared_cluster.up()
    yield shared_cluster
    kinds = "pods,services,deployments,jobs,secrets,configmaps,persistentvolumeclaims"
    shared_cluster.kubectl("delete", kinds, "--all", "--force", "--grace-period=0", "--wait=false")


@pytest.fixture(scope="package")
def _three_nodes() -> Iterator[TestCluster]:
    with local_cluster(nodes=3, operator=True, backoff_scale=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def three_nodes(_three_nodes: TestCluster) -> TestCluster:
    """Three nodes and an operator. Each file finds it empty, and asks for everything that it leaves to be deleted."""
    eventually(lambda: not _three_nodes.kubectl("get", "llmd,pods", "-o", "name"), "nothing to be left", 90)
    return _three_nodes
