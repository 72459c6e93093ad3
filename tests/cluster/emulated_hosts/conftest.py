from collections.abc import Iterator

import pytest

from tests.support.cluster.emulated import Cluster, emulated, why_not
from tests.support.cluster.launching import Train, on_one_host, prepared_workplace
from tests.support.workplace import Workplace


@pytest.fixture(scope="session")
def can_emulate() -> None:
    """Skips where this machine cannot emulate hosts, and says why."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared(can_emulate, tmp_path_factory) -> Workplace:
    """A prepared workplace that all hosts see, with a run of two ranks on one host, named "one_host"."""
    place = prepared_workplace(tmp_path_factory.mktemp("shared"))
    on_one_host(place, run__name="one_host")
    return place


@pytest.fixture(scope="session")
def hosts(can_emulate, tmp_path_factory) -> Iterator[Cluster]:
    """One launching host and two nodes for all tests."""
    with emulated(tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster


@pytest.fixture
def cluster(hosts) -> Iterator[Cluster]:
    """The hosts with nothing running on them, whatever a test leaves."""
    yield hosts
    hosts.clear()


@pytest.fixture
def train(cluster, shared) -> Train:
    return Train(cluster, shared)
