from typing import Any

import pytest

WAITING = ("tests/cluster/", "tests/e2e/test_resume.py")
COMPUTING = ("tests/distributed/", "tests/e2e/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With two workers whole commands run in two streams: those that wait for time-outs and signals, and the others.

    So process groups and emulated hosts are made once, as with one. Other files go where there is time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Streams(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(WAITING):
                return "waiting"
            return "computing" if nodeid.startswith(COMPUTING) else nodeid.partition("::")[0]

    return Streams(config, log)
