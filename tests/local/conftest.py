"""One local cluster for all tests of local mode."""

from collections.abc import Iterator

import pytest
from tests.local.harness import TestCluster, local_cluster


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
