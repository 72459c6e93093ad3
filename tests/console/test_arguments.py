"""Words of the command line become values, or are refused with what was expected."""

import argparse

import pytest

from trainer.console.arguments import indices, link_speed, memory_size, names, port, positive_float, positive_int


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("512mib", 2**29),
        ("7B", 7),
    ],
)
def test_an_amount_of_memory_is_read_in_its_own_unit(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "GiB", "24 Gi", "-1GiB", "0GiB", "1e9B", "nanGiB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected an amount of memory such as 24GiB"):
        memory_size(text)


def test_numbers_ports_names_and_lists_are_read():
    assert (positive_int("12"), port("65535"), indices("2,0,2")) == (12, 65535, [0, 2])
    assert (names("base,runs/a"), names("none")) == (["base", "runs/a"], [])
    assert positive_float("312.5") == 312.5


@pytest.mark.parametrize(("text", "bytes_per_second"), [("400Gbit", 50e9), ("3.2Tbit/s", 400e9), ("200mbit", 25e6)])
def test_the_rate_of_a_link_is_read_in_bits(text, bytes_per_second):
    assert link_speed(text) == bytes_per_second


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((positive_int, text) for text in ("0", "-3", "1.5")),
        *((positive_float, text) for text in ("0", "-1", "nan", "inf", "x")),
        *((link_speed, text) for text in ("400", "400GB", "0Gbit", "-1Gbit", "Gbit", "1e9bit")),
        *((port, text) for text in ("0", "65536")),
        (indices, "0,x"),
    ],
)
def test_other_words_are_refused_with_what_was_expected(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}': expected "):
        read(text)
