from typing import Any

import pytest

STREAMS = ("tests/cluster/emulated_hosts/", "tests/distributed/", "tests/e2e/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each of the long folders to one worker, so that hosts, process groups and runs are made once.

    Other files go where there is time. Most of these tests wait more than they compute, for time-outs and signals.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Streams(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in STREAMS if nodeid.startswith(folder)), nodeid.partition("::")[0])

    return Streams(config, log)
