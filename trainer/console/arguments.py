"""Types of command-line arguments, for argparse: each turns a word into a value or says what was expected."""

import argparse
import os
import re
from pathlib import Path

LAST_PORT = 65535


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def link_speed(text: str) -> float:
    """Bytes per second, from bits: 400Gbit is 50 x 10^9."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])bit(?:/s)?", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a rate such as 400Gbit or 3.2Tbit")
    return float(found[1]) * {"m": 1e6, "g": 1e9, "t": 1e12}[found[2].lower()] / 8


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port from 1 to {LAST_PORT}")
    return int(text)


def path(text: str) -> Path:
    """A path; the shell leaves the ~ of `--to=~/folder` alone."""
    return Path(os.path.expanduser(text))


def memory_size(text: str) -> int:
    """Bytes, with a unit: 24GiB is 24 x 2^30, 80GB is 80 x 10^9."""
    from pydantic import ByteSize, TypeAdapter, ValidationError  # takes 0.1 s, which a rank's start has no use for

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0 or not text.rstrip().lower().endswith("b"):  # ByteSize also takes a number without a unit
        raise argparse.ArgumentTypeError(f"{text!r}: expected an amount of memory such as 24GiB or 80GB")
    return size


def names(text: str) -> list[str]:
    """Names or paths separated by commas; `none` is an empty list."""
    return [] if text == "none" else [os.path.expanduser(name) for name in text.split(",") if name]


def indices(text: str) -> list[int]:
    """Distinct numbers from 0, separated by commas, in ascending order."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers separated by commas, such as 0,2")
    return sorted({int(part) for part in text.split(",")})
