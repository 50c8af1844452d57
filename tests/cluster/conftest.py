"""``slurm``: one cluster for all tests of a session, started by the first that asks and stopped at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Cluster, ClusterUnavailable, remove_orphans, session_folder


@pytest.fixture(scope="session")
def _running_cluster() -> Iterator[Cluster]:
    remove_orphans()
    cluster = Cluster(session_folder())
    try:
        cluster.start()
    except ClusterUnavailable as reason:
        pytest.skip(str(reason))
    yield cluster
    cluster.stop()


@pytest.fixture
def slurm(_running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, with SLURM_CONF set to it for this test, both nodes up, and the test's jobs cancelled after it."""
    for name, value in _running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield _running_cluster
    _running_cluster.reset()
