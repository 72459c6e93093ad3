"""What a terminal may be shown of text that strangers wrote."""

import pytest

from data_prep.terminal_text import without_control_codes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Ünïcödé, 汉字, 👋\n\tindented", "plain, Ünïcödé, 汉字, 👋\n\tindented"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x1b[2J\x9b31m", r"\x1b[2J\x9b31m"),
        ("right\rwrong\b\x7f", r"right\rwrong\x08\x7f"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
    ],
)
def test_control_codes_are_escaped_and_text_is_not(text, shown):
    assert without_control_codes(text) == shown
