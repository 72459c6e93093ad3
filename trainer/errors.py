"""What ends a run that no person's mistake ended. Imports nothing, so that the command can name it."""


class TrainingFault(RuntimeError):
    """Training cannot go on; the text says step, ranks and cause. Raised on every rank, weights untouched."""


class LostRank(TrainingFault):
    """Another rank has ended or does not answer: its cause is elsewhere. Raised on the ranks that notice."""


class Stopped(Exception):
    """The run was asked to end and has saved where it stands; the text says so. Raised on every rank."""
