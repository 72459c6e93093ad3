"""From its first imports to its last breath a signal costs a rank nothing but its remaining steps."""

import subprocess
import sys

import pytest

# A signal comes when Python is past giving handlers back, as it takes its modules down.
LATE = """
import os, signal, sys
from trainer.run.stop_signal import StopSignal
class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.{name}):
        kill(me, number)
late = Late()
stop = StopSignal()
stop.ignore()
sys.exit(75)
"""


def python(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], timeout=60).returncode


def test_the_command_imports_nothing_heavy_before_it_listens():
    heavy = "{'torch', 'pydantic', 'yaml', 'numpy'}"
    assert python(f"import sys, trainer.cli; sys.exit(bool({heavy} & set(sys.modules)))") == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_python_exits_does_not_change_the_status(name):
    assert python(LATE.format(name=name)) == 75
