"""UTF-8 whatever the locale: names of files and the texts of libraries, not only our own."""

import codecs
import locale
import os
import sys


def restart_in_utf8_mode() -> None:
    """Starts this command again, in this process, if Python reads texts and names of files in another encoding.

    Python chooses that at its start, by the locale: a recipe that names données.jsonl could not be followed. Children
    inherit the choice.
    """
    if sys.flags.utf8_mode or codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    if sys.executable:  # unknown where another program embeds Python; then only children are in this mode
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
