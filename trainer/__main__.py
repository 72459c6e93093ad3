"""`python -m trainer COMMAND ...`; also runs by its path, as launchers start ranks, from a clone and from a wheel."""

import os
import sys

if not __package__:  # by its path: Python put this folder on sys.path, where the folder that holds the package belongs
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if os.path.abspath(path) != here)]

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
