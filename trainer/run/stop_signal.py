"""Signals by which schedulers ask a process to end. Imports nothing heavy: handlers must be set before torch loads."""

import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Records a request to end instead of ending; training checks it after each step.

    Create it in the main thread: Python allows signal handlers only there.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        for number in ASKING:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def ignore(self) -> None:
        """Ignores the signals from now on: at exit Python restores their defaults, so one would change the status."""
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)
