import pytest

WAITING = ("tests/cluster/", "tests/e2e/test_resume.py")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Slow tests run in two streams, one after another in each: those that wait for time-outs and signals, the others.

    So a session's fixtures (process groups, emulated hosts) are made once, as without streams. In this hook because
    xdist reads the groups as soon as all is collected.
    """
    if item.get_closest_marker("slow") is not None:
        stream = "waiting" if item.nodeid.startswith(WAITING) else "computing"
        item.add_marker(pytest.mark.xdist_group(stream))
