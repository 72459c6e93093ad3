"""Files of the base in an export: copied as they are, and readable by transformers 4."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer
from trainer.export.base_files import copy_tokenizer, write_config

TURNS = [{"role": "user", "content": "Sort the words"}]
OLD_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML_TEMPLATE, "eos_token": "<|im_end|>"}


@pytest.fixture
def base(tmp_path):
    """A base with the tokenizer files of an older family, and with other files."""
    folder = tmp_path / "base"
    tiny_tokenizer().save_pretrained(folder)
    files = {
        "tokenizer_config.json": json.dumps(OLD_CLASS),  # on one line, as people write it
        "special_tokens_map.json": '{"eos_token": "<|im_end|>"}',
        "added_tokens.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2\n",
        "tokenizer.model": "\x00\xff",
        "chat_template.jinja": "{{ messages[0]['content'] }}\r\n",
        "additional_chat_templates/tool_use.jinja": "with tools",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode("latin-1"))
    (folder / "README.md").write_text("a model")
    (folder / "model.safetensors").write_text("")
    return folder


def copied(base, tmp_path, template=None):
    """The folder that the base's tokenizer was copied to, and what tokenizer_config.json says there."""
    folder = tmp_path / "exported"
    folder.mkdir()
    copy_tokenizer(base, folder, AutoTokenizer.from_pretrained(base), template)
    return folder, json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_by_transformers_5(base, **keys):
    """Makes the base's tokenizer one that transformers 5 saved."""
    path = base / "tokenizer_config.json"
    config = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>"}
    path.write_text(json.dumps({**config, **keys}))
    (base / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    (base / "additional_chat_templates" / "tool_use.jinja").unlink()
    (base / "special_tokens_map.json").unlink()


def test_tokenizer_files_are_copied_byte_for_byte(base, tmp_path):
    folder, _ = copied(base, tmp_path)
    others = ("README.md", "model.safetensors")
    assert contents(folder) == {name: data for name, data in contents(base).items() if name not in others}


def test_copies_of_read_only_files_can_be_written(base, tmp_path):
    for path in base.rglob("*.json"):
        path.chmod(0o444)
    folder, _ = copied(base, tmp_path)
    assert (folder / "tokenizer.json").stat().st_mode & 0o200


def test_the_recipes_template_replaces_all_templates_of_the_base(base, tmp_path):
    template = "{% for m in messages %}[{{ m['content'] }}] é{% endfor %}"
    folder, config = copied(base, tmp_path, template)
    assert config == {**OLD_CLASS, "chat_template": template}
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == template
    assert not (folder / "additional_chat_templates").exists()
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    unchanged = ("tokenizer.json", "special_tokens_map.json", "tokenizer.model", "merges.txt")
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in unchanged)


def test_a_base_without_tokenizer_config_gets_one_for_the_recipes_template_only(base, tmp_path):
    (base / "tokenizer_config.json").unlink()
    assert copied(base, tmp_path, "own")[1] == {"chat_template": "own"}


def test_a_class_of_transformers_5_gets_the_older_name_and_keys(base, tmp_path):
    saved_by_transformers_5(base, extra_special_tokens=["<|im_start|>"], is_local=True)
    folder, config = copied(base, tmp_path)
    assert config == {
        "additional_special_tokens": ["<|im_start|>"],
        "chat_template": CHATML_TEMPLATE,
        "clean_up_tokenization_spaces": False,  # version 4 would take True
        "eos_token": "<|im_end|>",
        "model_input_names": ["input_ids", "attention_mask"],  # version 4 would add token_type_ids
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    assert (folder / "chat_template.jinja").read_text() == CHATML_TEMPLATE
    found, expected = (AutoTokenizer.from_pretrained(path) for path in (folder, base))
    assert found.apply_chat_template(TURNS) == expected.apply_chat_template(TURNS)
    assert found.special_tokens_map == expected.special_tokens_map
    assert found("a b, c").data == expected("a b, c").data


def test_a_list_of_extra_tokens_gets_the_older_key_whatever_the_class(base, tmp_path):
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**OLD_CLASS, "tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": []}))
    _, config = copied(base, tmp_path)
    assert "extra_special_tokens" not in config
    assert (config["tokenizer_class"], config["additional_special_tokens"]) == ("Qwen2Tokenizer", [])


def test_several_templates_get_the_older_form(base, tmp_path):
    saved_by_transformers_5(base)
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    folder, config = copied(base, tmp_path)
    named = [{"name": "default", "template": CHATML_TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    assert sorted(config["chat_template"], key=lambda one: one["name"]) == named
    assert isinstance(AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast)


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
YARN_IN_4 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
GEMMA = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("family", "keys", "older"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ("qwen3", {"rope_parameters": YARN}, {"rope_theta": 1e6, "rope_scaling": YARN_IN_4}),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
            {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {"rope_parameters": GEMMA},
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"type": "linear", "factor": 8.0},
            },
        ),
        ("llama", {"rope_theta": 7e5, "rope_scaling": None}, {}),
        ("gpt2", {}, {}),
    ],
)
def test_transformers_4_finds_the_rotary_settings_under_the_older_keys(tmp_path, family, keys, older):
    base, folder = tmp_path / "base", tmp_path / "exported"
    base.mkdir(), folder.mkdir()
    config = {"model_type": family, "architectures": ["X"], "max_position_embeddings": 1024, **keys}
    (base / "config.json").write_text(json.dumps(config))
    write_config(base, folder, torch.bfloat16)
    found = json.loads((folder / "config.json").read_text())
    assert found == {**config, **older, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    now, then = (vars(AutoConfig.from_pretrained(path)).get("rope_parameters") for path in (folder, base))
    assert without_type(now) == without_type(then)


def without_type(rope):
    """Version 5 keeps `type` beside rope_type."""
    return rope and {
        key: without_type(value) if isinstance(value, dict) else value for key, value in rope.items() if key != "type"
    }


def test_a_dtype_that_the_base_names_in_the_older_way_is_replaced_in_its_place(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "exported"
    base.mkdir(), folder.mkdir()
    (base / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16", "vocab_size": 8}')
    (base / "generation_config.json").write_text('{"eos_token_id":[2]}')
    write_config(base, folder, torch.float32)
    assert list(json.loads((folder / "config.json").read_text()).items()) == [
        ("model_type", "llama"),
        ("torch_dtype", "float32"),
        ("vocab_size", 8),
        ("dtype", "float32"),
    ]
    assert (folder / "generation_config.json").read_text() == '{"eos_token_id":[2]}'
