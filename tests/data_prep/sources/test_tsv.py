"""TSV: quotes are text, unless a cell can only be quoted; no line is ever swallowed."""

import csv

import pytest

from data_prep.user_error import UserError
from tests.data_prep.reading import places, read, refusal, rows_of, texts

HEADER = "instruction\toutput\n"
SPANS = "a cell in quotes over several lines, or a lone quote; a TSV has one row per line, save the file as CSV"


@pytest.fixture
def table(tmp_path):
    def write(content: str, name: str = "a.tsv"):
        path = tmp_path / name
        path.write_bytes(content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('"Hello', '"Hello'),
        ('Hello"', 'Hello"'),
        ('"Hello" she said', '"Hello" she said'),
        ('say "Hello"', 'say "Hello"'),
        ('"Hello"', '"Hello"'),
        ('""Hello""', '""Hello""'),
        ('"', '"'),
        ('5" pipe', '5" pipe'),
        ('"a, b"', '"a, b"'),
        ('"She said ""hi"""', 'She said "hi"'),
        ('"""Hello"""', '"Hello"'),
        ('"a\tb"', "a\tb"),
    ],
)
@pytest.mark.parametrize("row", ["{}\tx", "x\t{}"], ids=["first", "last"])
def test_a_cell_is_text_unless_it_can_only_be_quoted(table, row, cell, text):
    path = table(HEADER + "a\tb\n" + row.format(cell) + "\nc\td\n")
    expected = [part.format(text) for part in row.split("\t")]
    assert texts(read(path)) == [["a", "b"], expected, ["c", "d"]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_line_ends_of_any_system_bom_and_blank_lines(table, end):
    path = table("\ufeff" + end.join(["", "instruction\toutput", "", 'a\t"1', "", "b\t2"]))
    documents = read(path)
    assert texts(documents) == [["a", '"1'], ["b", "2"]]
    assert places(documents) == [":4", ":6"]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_lone_carriage_return_in_a_cell_is_text(table, end):
    path = table(end.join(["instruction\toutput", "a\rb\tc\rd", "e\tf"]) + end)
    assert texts(read(path)) == [["a\rb", "c\rd"], ["e", "f"]]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_what_csv_writers_quote_reads_as_it_was_written(tmp_path, quoting):
    rows = [["What, is it?", "1"], ['a "quoted"\ttext', "two"], ['"Yes"', 'say "x"'], ["é", "4"]]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([["instruction", "output"], *rows])
    assert texts(read(tmp_path / "a.tsv")) == rows


def test_a_table_with_a_quoted_header_may_span_lines(table):
    path = table('"instruction"\t"output"\n"a\nb"\t"c"\n"d"\t"e"\n')
    assert texts(read(path)) == [["a\nb", "c"], ["d", "e"]]


@pytest.mark.parametrize(
    "rows",
    [
        'x\t"two\nlines"\n',
        '"two\nlines"\tx\n',
        'x\t"two\n\nparagraphs"\n',
        'write f\t"def f():\n\treturn 1"\n',
        'x\t"said ""hi""\nand left"\n',
        'x\t"three\nlong\nlines"\n',
    ],
    ids=["last cell", "first cell", "blank line", "tab in the text", "quotes in it", "three lines"],
)
@pytest.mark.parametrize("after", ["a\tb\n", ""], ids=["row after", "end of file after"])
def test_a_quoted_cell_over_several_lines_is_refused(table, rows, after):
    path = table(HEADER + "a\tb\n" + rows + after)
    assert refusal(path).startswith(f"{path}:3: {SPANS}")


def test_lines_in_a_table_of_one_column_may_be_one_cell(table):
    path = table('text\n"two\nlines"\n')
    assert refusal(path).startswith(f"{path}:2: {SPANS}")
    assert texts(read(table('text\n"one\nb\n'))) == ['"one', "b"]


def test_rows_with_other_numbers_of_cells_are_bad_one_by_one(table):
    path = table(HEADER + 'a\tb\tc\nd\ne\t"f" g\n')
    assert [str(row) if isinstance(row, UserError) else texts([row])[0] for row in rows_of(path)] == [
        f"{path}:2: 3 values in 2 columns; correct the row or its quotes",
        f"{path}:3: 1 values in 2 columns; correct the row or its quotes",
        ["e", '"f" g'],
    ]


def test_every_line_is_a_row_however_many_quotes_there_are(table):
    lines = [f'{i}\t"begins' if i % 3 else f'{i}\tends"' for i in range(1000)]
    documents = read(table(HEADER + "\n".join(lines)))
    assert ["\t".join(turns) for turns in texts(documents)] == lines
