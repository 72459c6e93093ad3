"""Exceptions that end a run, other than users' mistakes (data_prep.user_error). Imports nothing."""


class TrainingFault(RuntimeError):
    """Training cannot go on. The text says step, ranks and cause. Raised on every rank, with the weights untouched."""


class OwnFault(TrainingFault):
    """A fault of this rank's own machine or set-up. The other ranks notice only that this one is gone."""


class LostRank(TrainingFault):
    """Another rank has ended or does not answer: its cause is elsewhere. Raised on the ranks that notice."""


class Stopped(Exception):
    """The run was asked to end and has saved its state; the text says so. Raised on every rank."""
