"""What a run and whoever starts it tell each other: exit statuses and environment variables."""

MISTAKE = 2  # exit status after a person's mistake
FAULT = 1  # exit status after a fault while running
STOPPED = 75  # exit status of a run that saved and ended as a signal asked: sysexits' EX_TEMPFAIL, "run me again"
INTERRUPTED = 130  # exit status after Ctrl-C where there is nothing to save: 128 and the signal's number

STATUS_FILE = "TEAMLORA_STATUS_FILE"  # variable: where rank 0 leaves its exit status, which a launcher may not pass on
LAUNCH_ID = "TEAMLORA_LAUNCH_ID"  # variable: a name that all ranks of one launch share, and no other launch has
