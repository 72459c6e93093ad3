"""Exports that servers and libraries older than transformers 5 and this PEFT must read."""

import json

import pytest

from tests.support.finished_run import finish_run, prepare_tasks
from trainer.export.export import ExportRequest, export

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
KNOWN_SINCE_PEFT_0_5 = {
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a chat template of its own; transformers 5 saved its base's tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "template.jinja").write_text(TEMPLATE)
    return finish_run(prepare_tasks(folder), folder / "runs" / "first")


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_an_exported_tokenizer_is_the_bases_and_needs_no_transformers_5(run, to, tmp_path):
    """Case 29-exported-tokenizer-only-for-transformers-5."""
    folder = export(ExportRequest(run.folder, to, tmp_path / to)).folder
    stored = json.loads((run.base / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "TokenizersBackend"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in config
    assert {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "model_max_length")} == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "model_max_length": stored["model_max_length"],
    }
    assert config["chat_template"] == TEMPLATE == (folder / "chat_template.jinja").read_text()
    assert (folder / "tokenizer.json").read_bytes() == (run.base / "tokenizer.json").read_bytes()
    if to == "merged":
        found, base = (json.loads((path / "config.json").read_text()) for path in (folder, run.base))
        assert {key: found[key] for key in base} == base
        assert found["torch_dtype"] == found["dtype"] == "float32"
        assert found["rope_theta"] == 10000.0


def test_an_exported_lora_has_only_keys_that_older_readers_know(run, tmp_path):
    """Case 36-adapter-config-with-many-new-keys."""
    folder = export(ExportRequest(run.folder, "lora", tmp_path / "lora")).folder
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.keys() == KNOWN_SINCE_PEFT_0_5
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 12, 12)
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


def test_an_old_runs_lora_exported_as_it_is_has_only_keys_that_older_readers_know(run, tmp_path):
    """Case 36 for the adapter itself: PEFT wrote the run's configuration whole."""
    old = finish_run(run.base.parent, tmp_path / "runs" / "lora", "lora")
    assert "kasa_config" in json.loads((old.folder / "adapter" / "adapter_config.json").read_text())
    folder = export(ExportRequest(old.folder, "peft")).folder
    assert json.loads((folder / "adapter_config.json").read_text()).keys() == KNOWN_SINCE_PEFT_0_5
