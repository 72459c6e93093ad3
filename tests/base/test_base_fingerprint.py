"""A base is told from another by its fingerprint, and is itself wherever and however it is stored."""

import json
import shutil

import pytest
import torch

from data_prep.user_error import UserError
from tests.base.test_refusals import edit_config, edit_weights
from tests.support.tiny_models import tiny_llama
from trainer.base.base_fingerprint import check_base_file, fingerprint, write_base_file


def test_files_and_folders_do_not_matter(tmp_path):
    one = fingerprint(tiny_llama(tmp_path / "one"))
    assert fingerprint(tiny_llama(tmp_path / "many", max_shard_size="50KB")) == one
    shutil.move(tmp_path / "one", tmp_path / "moved")
    assert fingerprint(edit_config(tmp_path / "moved", transformers_version="9.9.9")) == one


def change_one_weight(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5


def change_a_dtype(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float32)


@pytest.mark.parametrize("edit", [change_one_weight, change_a_dtype])
def test_weights_that_differ_give_another(tmp_path, edit):
    folder = tiny_llama(tmp_path)
    before = fingerprint(folder)
    assert fingerprint(edit_weights(folder, edit)) != before


def test_sampling_fewer_tensors_still_tells_names_and_shapes_and_is_the_same_where_there_are_no_more(tmp_path):
    folder = tiny_llama(tmp_path)
    assert fingerprint(folder, most=1000) == fingerprint(folder)
    assert fingerprint(folder, most=3) not in (fingerprint(folder), fingerprint(folder, most=2))
    before = fingerprint(folder, most=3)
    assert fingerprint(edit_weights(folder, change_a_dtype), most=3) != before


def test_another_seed_and_another_config_give_another(tmp_path):
    first = fingerprint(tiny_llama(tmp_path / "a"))
    assert fingerprint(tiny_llama(tmp_path / "b", seed=1)) != first
    assert fingerprint(edit_config(tmp_path / "a", rms_norm_eps=1e-3)) != first


def test_an_adapter_on_its_base_passes_and_on_another_is_refused(tmp_path):
    write_base_file(tmp_path, "models/one", "a" * 64)
    check_base_file(tmp_path, "elsewhere/one", "a" * 64)
    with pytest.raises(UserError, match=r"base\.model=models/two: .*trained on another base, models/one .*use that"):
        check_base_file(tmp_path, "models/two", "b" * 64)


def test_an_adapter_without_a_record_is_taken_and_a_damaged_record_is_told(tmp_path):
    check_base_file(tmp_path, "models/one", "a" * 64)
    (tmp_path / "base.json").write_text("{")
    with pytest.raises(UserError, match=r"base\.json: not readable as JSON"):
        check_base_file(tmp_path, "models/one", "a" * 64)


def test_the_record_is_json_that_names_the_model(tmp_path):
    write_base_file(tmp_path, "models/one", "c" * 64)
    assert json.loads((tmp_path / "base.json").read_text()) == {"model": "models/one", "fingerprint": "c" * 64}
