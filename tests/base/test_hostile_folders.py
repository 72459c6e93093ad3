"""Folders of a base that claim what they do not hold: refused in one line, before anything is read by their numbers."""

import json
import struct
from pathlib import Path

import pytest

from data_prep.user_error import UserError
from trainer.base.base_fingerprint import fingerprint
from trainer.base.model_folder import files_of_model

INDEX = "model.safetensors.index.json"
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", 3, ["x"]])
def test_an_index_that_names_files_elsewhere(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: not readable as an index \(.*; fetch the"):
        files_of_model(tmp_path)


def test_an_index_that_names_files_beside_it(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    assert files_of_model(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def write(folder: Path, header: bytes, length: int | None = None, data: bytes = b"\0\0\0\0") -> Path:
    (folder / "config.json").write_text("{}")
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data)
    return folder


def header(**changed: object) -> bytes:
    return json.dumps({"a": {**ENTRY, **changed}}).encode()


def test_a_header_of_two_tensors_and_notes(tmp_path):
    two = {"__metadata__": {"format": "pt"}, "a": ENTRY, "b": {**ENTRY, "shape": [0], "data_offsets": [4, 4]}}
    assert len(fingerprint(write(tmp_path, json.dumps(two).encode()))) == 64


UNREADABLE = r"model\.safetensors: not a readable safetensors file \(.*\); fetch the model again"


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**32, 100_000_001, 90])
def test_a_header_that_is_longer_than_its_file(tmp_path, length):
    with pytest.raises(ValueError, match=rf"\(a header of {length} bytes in \d+\)"):
        fingerprint(write(tmp_path, header(), length))


@pytest.mark.parametrize("offsets", [[0, 5], [0, 2**62], [-8, 4], [4, 0], [2**62, 2**62 + 4], ["0", 4], [0], 3])
def test_offsets_outside_the_file(tmp_path, offsets):
    with pytest.raises(ValueError, match=UNREADABLE):
        fingerprint(write(tmp_path, header(data_offsets=offsets)))


@pytest.mark.parametrize("shape", [[2**62, 2**62], [10**400], [33], [-1], [-3, -5], ["x"], [None], 3, None])
def test_shapes_that_the_bytes_cannot_hold(tmp_path, shape):
    with pytest.raises(ValueError, match=UNREADABLE):
        fingerprint(write(tmp_path, header(shape=shape)))


@pytest.mark.parametrize("content", [b"[]", b"3", b'{"a": 3}', b"{", b"\xff", b"[" * 100_000, b'{"a": {"shape": [1]}}'])
def test_headers_of_another_form(tmp_path, content):
    with pytest.raises(ValueError, match=UNREADABLE):
        fingerprint(write(tmp_path, content))
