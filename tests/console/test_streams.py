"""A command whose reader has gone works on, and ends as it would have."""

import subprocess
import sys

import pytest

PRINTING = """
import sys
from rich.console import Console
from trainer.console.streams import survive_closed_streams
with survive_closed_streams():
    for _ in range(2):
        print("to nobody")
        print("to nobody", file=sys.stderr, flush=True)
        Console().print("to nobody")
sys.exit(75)
"""
STOPPED = """
import sys
from trainer import cli
from trainer.errors import Stopped
def stop(options):
    print("step 1", flush=True)
    raise Stopped("saved")
cli._recipe = stop
sys.exit(cli.main(["prepare", "recipe.yaml"]))
"""


@pytest.mark.parametrize("code", [PRINTING, STOPPED])
def test_a_reader_that_has_gone_changes_no_status(code):
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 75
