"""Tables of text: alignment on a terminal and in Markdown."""

from data_prep.tables import markdown_table, text_table

HEAD = ("task", "rows", "removed")
ROWS = [("sums", "12,000", "3 (1 a|b)"), ("数学", "7", "")]


def test_numbers_are_right_aligned_and_columns_in_left_are_not():
    assert text_table(HEAD, ROWS, left=(0, 2)).splitlines() == [
        "task    rows  removed",
        "sums  12,000  3 (1 a|b)",
        "数学       7",
    ]


def test_markdown_marks_right_aligned_columns_and_escapes_bars():
    assert markdown_table(HEAD, ROWS, left=(0, 2)).splitlines() == [
        "| task |   rows | removed    |",
        "|------|-------:|------------|",
        r"| sums | 12,000 | 3 (1 a\|b) |",
        "| 数学 |      7 |            |",
    ]


def test_a_table_of_a_head_only_has_no_rows():
    assert text_table(HEAD, []) == "task  rows  removed"
    assert markdown_table(("a",), []).splitlines() == ["| a |", "|---|"]
