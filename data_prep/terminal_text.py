"""Text of data and models as a terminal may show it."""

import re

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_control_codes(text: str) -> str:
    r"""Escapes what makes a terminal do more than show text: move the cursor, set its title, write the clipboard.

    Line feeds and tabs stay; marks that turn the direction of text round are escaped too.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
