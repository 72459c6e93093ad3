"""Tokenizers of Llama 2 and Mistral 7B, which write a space before texts: ids and labels are those of transformers.

transformers 5 makes LlamaTokenizer of Llama 2's files, which writes that space at the beginning only, while
tokenizer.json writes it after every control token as well.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.encode import Encoder
from data_prep.tokenizer_checks import check_tokenizer
from data_prep.user_error import UserError
from trainer.base.model_config import load_tokenizer

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    ("user", "What is the turn?"),
    ("assistant", "é🙂 is it"),
    ("user", " a turn"),
    ("assistant", "turn\n it"),
)
MESSAGES = [dict(zip(("role", "content"), turn, strict=True)) for turn in TURNS]
PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FIRST = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def base_of(folder: Path, template: str, *, prepends: bool, model_type: str = "llama", specials=(), **config) -> Path:
    """The tokenizer files of a small base. prepends: as Llama 2's tokenizer.json, else as that of Mistral 7B v0.3."""
    names = ["<unk>", "<s>", "</s>", *specials]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names + bytes_, show_progress=False)
    tokenizer.train_from_iterator(["What is the turn? It is it, a word."] * 3, trainer)
    tokenizer.normalizer = PREPENDED if prepends else None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    described = json.loads(tokenizer.to_str())
    described["pre_tokenizer"] = None if prepends else json.loads(FIRST.__getstate__())
    described["added_tokens"] = described["added_tokens"][: len(names)]  # bytes are no control tokens
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(described))
    keys = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **keys}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    return folder


def loaded(base: Path):
    return load_tokenizer(SimpleNamespace(model=str(base), trust_remote_code=False))


def encode(tokenizer, document: Document):
    source = {"type": "files", "task": "task", "path": "unused"}
    return Encoder(tokenizer, DataConfig(prepared_dir="unused", sources=[source], seq_len=512)).encode([document])[0]


CASES = {
    "llama 2": {"template": LLAMA_2, "prepends": True, "legacy": False},
    "llama 2, legacy": {"template": LLAMA_2, "prepends": True, "legacy": True},
    "llama 2, as its file": {"template": LLAMA_2, "prepends": True, "tokenizer_class": "PreTrainedTokenizerFast"},
    "tinyllama": {"template": ZEPHYR, "prepends": True, "legacy": False},
    "zephyr": {"template": ZEPHYR, "prepends": True, "model_type": "mistral", "legacy": True},
    "mistral 0.1": {"template": MISTRAL, "prepends": True, "model_type": "mistral", "legacy": True},
    "mistral 0.3": {
        "template": MISTRAL, "prepends": False, "model_type": "mistral", "specials": ("[INST]", "[/INST]")
    },
}  # fmt: skip
ANSWERS = {  # what the model has to write
    LLAMA_2: [" é🙂 is it </s>", " turn\n it </s>"],
    ZEPHYR: ["é🙂 is it</s>", "turn\n it</s>"],
    MISTRAL: ["é🙂 is it</s>", "turn\n it</s>"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_has_the_ids_that_apply_chat_template_gives_and_its_answers_are_labelled(case, tmp_path):
    tokenizer = loaded(base_of(tmp_path / "base", **CASES[case]))
    check_tokenizer(tokenizer)
    encoded = encode(tokenizer, Document("task", MESSAGES, "a.jsonl:1"))
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    # transformers tokenizes the whole text; a token belongs to the answer whose characters it stands for
    text, labels = tokenizer.apply_chat_template(MESSAGES, tokenize=False), set()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    position = 0
    for answer in ANSWERS[CASES[case]["template"]]:
        start = text.index(answer, position)
        position = start + len(answer)
        labels |= {i for i, (first, end) in enumerate(offsets) if first < position and end > start}
    assert encoded.scored.nonzero()[0].tolist() == sorted(labels)
    written = tokenizer.decode(encoded.input_ids[encoded.scored]).replace(" ", "")
    assert written == "".join(ANSWERS[CASES[case]["template"]]).replace(" ", "")


@pytest.mark.parametrize("text", ["word it", " word", "<|user|>\nWhat"])
@pytest.mark.parametrize("case", CASES)
def test_a_plain_text_has_the_ids_that_the_tokenizer_gives_and_an_end_token(case, text, tmp_path):
    tokenizer = loaded(base_of(tmp_path / "base", **CASES[case]))
    encoded = encode(tokenizer, Document("task", [], "a.txt", "text", text=text))
    assert encoded.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert encoded.scored.tolist() == [False] + [True] * (len(encoded) - 1)


def test_different_spaces_are_noted_with_what_tokenizer_json_gives(tmp_path):
    base = base_of(tmp_path / "base", LLAMA_2, prepends=True)
    file = Tokenizer.from_file(str(base / "tokenizer.json"))
    made, expected = (
        [file.token_to_id(token) for token in tokens] for tokens in (["</s>", "wor", "d"], ["</s>", "▁wor", "d"])
    )
    tokenizer = loaded(base)
    (note,) = check_tokenizer(tokenizer)
    assert tokenizer("</s>word", add_special_tokens=False)["input_ids"] == made
    assert note == (
        "LlamaTokenizer of transformers and tokenizer.json add different spaces before texts or after control tokens "
        f"('</s>word' is {made}, not {expected}); this set has the ids of LlamaTokenizer, as apply_chat_template gives "
        "them; for those of tools that read the file, such as llama.cpp, set tokenizer_class in tokenizer_config.json "
        "to PreTrainedTokenizerFast"
    )


@pytest.mark.parametrize("case", ["llama 2, as its file", "zephyr", "mistral 0.1", "mistral 0.3"])
def test_nothing_is_noted_where_the_file_is_followed(case, tmp_path):
    assert not check_tokenizer(loaded(base_of(tmp_path / "base", **CASES[case])))


@pytest.mark.parametrize(
    ("key", "value"),
    [("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}),
     ("normalizer", {"type": "Lowercase"})],
    ids=["a text begins without a space", "lower case"],
)  # fmt: skip
def test_other_differences_are_refused(key, value, tmp_path):
    base = base_of(tmp_path / "base", LLAMA_2, prepends=False)
    path = base / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    expected = (
        r"^base\.model: .*: LlamaTokenizer of transformers encodes 'Hello world' as \[.*\], but tokenizer\.json, "
    )
    with pytest.raises(UserError, match=expected):
        check_tokenizer(loaded(base))
