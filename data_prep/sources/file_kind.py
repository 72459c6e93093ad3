"""What a file is by its first bytes, where that is not what its name says: a pointer, a web page, an archive."""

import re
from pathlib import Path

from data_prep.user_error import UserError

START = 512  # bytes that are looked at

_LFS = "a Git LFS pointer, not the file; run `git lfs pull`"
_UNPACK = "unpack it, and give the files in it"
_NEVER_DATA = (
    (rb"version https://git-lfs\.github\.com/spec/", _LFS),
    (rb"(/|(\.\./)*\.git/)annex/objects/", "a git-annex pointer, not the file; run `git annex get`"),
    (rb"# xet version \d", "a Xet pointer, not the file; download it again with huggingface_hub"),
    (rb"(\.\./)+[\w./-]+\s*\Z", "a symbolic link saved as text, not the file; copy the file that it names"),
    (rb"PK(\x03\x04|\x05\x06)", f"a ZIP archive, as Excel's files are too; {_UNPACK}, or save it as CSV"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_UNPACK}"),
    (rb"Rar!\x1a\x07", f"a RAR archive; {_UNPACK}"),
    (rb"(?s).{257}ustar", f"a tar archive; {_UNPACK}"),
    (rb"%PDF-", "a PDF file; save its text as .txt"),
    (rb"SQLite format 3\0", "an SQLite database; export its rows as JSON lines"),
)
_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)\b", re.IGNORECASE)
_TABLES = {"parquet": rb"PAR1\x15", "arrow": rb"ARROW1\0\0"}
COMPRESSIONS = {
    ".gz": rb"\x1f\x8b", ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", ".xz": rb"\xfd7zXZ\0", ".zst": rb"\x28\xb5\x2f\xfd"
}  # fmt: skip


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(START)


def mistaken_for(start: bytes, kind: str | None, compression: str) -> str | None:
    """What a file that begins with `start` is, and the remedy; None if it may be what its name says.

    kind: the format of its rows. compression: the ending that its name has for one, or "".
    """
    start = start.removeprefix(b"\xef\xbb\xbf")
    for pattern, what in _NEVER_DATA:
        if re.match(pattern, start):
            return what
    if kind != "text" and _PAGE.match(start):
        return "a web page or an error in place of the file; download it again, with a login if it needs one"
    for name, pattern in _TABLES.items():
        if kind != name and re.match(pattern, start):
            return f"a file in the format {name}; set the source's `format: {name}`"
    for ending, pattern in COMPRESSIONS.items():
        if ending != compression and re.match(pattern, start):
            return f"compressed ({ending}), which its name does not say; unpack it, or end its name in {ending}"
    return None


def lacks_compression(start: bytes, ending: str) -> bool:
    """Whether a file that begins with `start` is certainly not compressed as the ending of its name says."""
    return len(start) >= 10 and not re.match(COMPRESSIONS[ending], start)  # a shorter one may be cut off


def lacks_checksum(start: bytes) -> bool:
    """Whether a file begins with a zstd frame without a checksum (RFC 8878, 3.1.1.1.1): gzip, bz2 and xz have one."""
    return start.startswith(b"\x28\xb5\x2f\xfd") and len(start) > 4 and not start[4] & 0b100


def refuse_lfs_pointer(path: Path, key: str) -> None:
    """Raises UserError if a file is the text that Git keeps in place of a large one. Leaves missing files alone."""
    try:
        start = first_bytes(path)
    except OSError:
        return
    if re.match(_NEVER_DATA[0][0], start):
        raise UserError(f"{key}: {path} is {_LFS}")
