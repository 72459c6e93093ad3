"""A process's anonymous memory (RssAnon): now, and its peak as another process sees it."""

import ctypes
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

# Samples the anonymous memory of the process given, every 2 ms, until its standard input ends; prints the peak.
WATCHER = """
import sys, time, threading
threading.Thread(target=lambda: (sys.stdin.read(), stopped.append(1))).start() if (stopped := []) is not None else 0
peak = 0
while not stopped:
    for line in open(f"/proc/{sys.argv[1]}/status"):
        if line.startswith("RssAnon"):
            peak = max(peak, 1024 * int(line.split()[1]))
    time.sleep(0.002)
print(peak)
"""


class PeakWatch:
    """Watches this process from where it is made until `peak` is asked for."""

    def __init__(self) -> None:
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-c", WATCHER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(0.3)

    def peak(self) -> int:
        """Bytes; ends the watch."""
        return int(self._watcher.communicate("")[0])


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def settled_bytes() -> int:
    """Anonymous bytes once garbage is collected and malloc has given back what is free at its top."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous_bytes()
