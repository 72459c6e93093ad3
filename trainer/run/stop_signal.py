"""The signals by which schedulers ask a process to end. Imports nothing heavy: it must stand before torch is there."""

import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that this process was asked to end, instead of ending; the run looks at each step's boundary.

    Made in the main thread, as Python's handlers must be.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        for number in ASKING:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def ignore(self) -> None:
        """From now on: as it exits, Python gives signals back their default, which would end it with another status."""
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)
