"""Amounts of memory as people write them."""

import re

UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def parse_size(text: str) -> int:
    """Bytes: 24GiB is 24 x 2^30, 80GB is 80 x 10^9. Raises ValueError for anything else, also without a unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    size = int(float(found[1]) * units[found[2].lower()]) if found and found[2].lower() in units else 0
    if size <= 0:
        raise ValueError(f"{text!r} is no amount of memory such as 24GiB or 80GB")
    return size
