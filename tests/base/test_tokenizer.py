"""The base's tokenizer always has a pad token, and its vocabulary stays as it is."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_models import tiny_llama
from trainer.base.model_config import load_tokenizer


def save_tokenizer(folder, **special):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "<pad>": 2, "word": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"eos_token": "<end>", "pad_token": "<pad>"}, "<pad>"),
        ({"eos_token": "<end>"}, "<end>"),
        ({"unk_token": "<unk>"}, "<unk>"),
    ],
    ids=["its own", "else the end", "else the unknown"],
)
def test_pad_token_without_a_change_of_vocabulary(tmp_path, base_of, special, pad):
    save_tokenizer(tiny_llama(tmp_path), **special)
    tokenizer = load_tokenizer(base_of(tmp_path))
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == 4
