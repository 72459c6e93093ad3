"""What cannot be a base is refused in one line that names the key or file and what to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.user_error import UserError
from tests.support.tiny_models import tiny_llama, tiny_model
from trainer.base.loader import load_base
from trainer.base.model_config import load_tokenizer
from trainer.base.weight_map import open_base


def edit_config(folder: Path, **keys: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def edit_weights(folder: Path, edit) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return folder


def refused(base, text: str, call=open_base) -> None:
    with pytest.raises(UserError, match=text) as caught:
        call(base)
    assert "\n" not in str(caught.value)


def loading(base):
    return load_base(base, "cpu")


def test_missing_folder(tmp_path, base_of):
    refused(
        base_of(tmp_path / "none"),
        r"base\.model: folder .*none does not exist; expected a folder or a Hub id",
    )


def test_file_in_the_place_of_a_folder(tmp_path, base_of):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(base_of(tmp_path / "model.gguf"), r"is a file; expected a folder")


def test_folder_without_a_model(tmp_path, base_of):
    refused(base_of(tmp_path), r"has no config\.json; expected the folder of a transformers model")


def test_hub_id_that_cannot_be_fetched(base_of, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("down")))
    refused(base_of("someone/model", revision="v1"), r"no folder someone/model here.*at revision v1.*local folder")


def test_config_that_is_no_json(tmp_path, base_of):
    folder = tiny_llama(tmp_path)
    (folder / "config.json").write_text("{")
    refused(base_of(folder), r"config\.json: not readable as JSON")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt"])
def test_pickled_weights(tmp_path, base_of, name):
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    refused(base_of(folder), rf"holds pickled weights only \({name}\).*expected \*\.safetensors: save the model")


def test_folder_without_weights(tmp_path, base_of):
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(base_of(folder), r"holds no \*\.safetensors")


@pytest.mark.parametrize(
    "found",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
    ],
    ids=lambda found: found["quant_method"],
)
def test_weights_that_are_already_quantised(tmp_path, base_of, found):
    folder = edit_config(tiny_llama(tmp_path), quantization_config=found)
    refused(
        base_of(folder),
        rf"already quantised \({found['quant_method']}\); expected bf16, fp16 or fp32 weights",
    )


def test_fp8_tensors_without_a_word_in_the_config(tmp_path, base_of):
    def to_fp8(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    folder = edit_weights(tiny_llama(tmp_path), to_fp8)
    refused(base_of(folder), r"up_proj\.weight .* has dtype F8_E4M3; expected bf16, fp16 or fp32", loading)


def test_unknown_architecture(tmp_path, base_of):
    folder = edit_config(tiny_llama(tmp_path), model_type="nonesuch")
    refused(base_of(folder), r"model_type 'nonesuch', which transformers cannot build")


def test_code_that_comes_with_the_model(tmp_path, base_of):
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    folder = edit_config(tiny_llama(tmp_path), model_type="nonesuch", auto_map=auto_map)
    refused(base_of(folder), r"brings Python code of its own .*base\.trust_remote_code: true")


def test_model_that_is_no_causal_lm(tmp_path, base_of):
    folder = edit_config(tiny_llama(tmp_path), model_type="t5")
    refused(base_of(folder), r"t5 is no causal language model")


def test_model_with_parts_for_images(tmp_path, base_of):
    folder = edit_config(tiny_llama(tmp_path), model_type="gemma3")
    refused(base_of(folder), r"gemma3 holds a language model beside parts for images .*such as gemma3_text")


def test_flash_attention_without_its_package_or_gpu(tmp_path, base_of):
    refused(
        base_of(tiny_llama(tmp_path), attention="flash_attention_2", dtype="bf16"),
        r"base\.attention=flash_attention_2: needs .*use sdpa",
    )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("mixtral", {"num_local_experts": 4}), ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32})],
)
def test_fused_experts(tmp_path, base_of, family, sizes, quantization):
    folder = tiny_model(tmp_path, family, **sizes)
    refused(base_of(folder, quantization=quantization), r"choose a dense", loading)


def test_matrices_that_are_no_linear_layers(tmp_path, base_of):
    folder = tiny_model(tmp_path, "gpt2")
    refused(base_of(folder, quantization="nf4"), r"gpt2 keeps .* outside a linear layer", loading)


def test_missing_tensors(tmp_path, base_of):
    folder = edit_weights(tiny_llama(tmp_path), lambda tensors: tensors.pop("model.norm.weight"))
    refused(base_of(folder), r"lacks 1 tensors of llama, first model\.norm\.weight", loading)


def test_shape_that_contradicts_the_config(tmp_path, base_of):
    folder = edit_config(tiny_llama(tmp_path), intermediate_size=128)
    refused(base_of(folder), r"has shape \[.*\], but config\.json makes it \[.*128.*\]", loading)


def test_damaged_file(tmp_path, base_of):
    folder = tiny_llama(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(base_of(folder), r"model\.safetensors: not a readable safetensors file", loading)


def test_one_name_in_two_files(tmp_path, base_of):
    folder = tiny_llama(tmp_path)
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "one.safetensors")  # by its own name it would be taken
    refused(base_of(folder), r"as another file of the folder does", loading)


def test_two_different_tensors_that_the_config_ties(tmp_path, base_of):
    folder = edit_config(tiny_llama(tmp_path, tie=False), tie_word_embeddings=True)
    refused(base_of(folder), r"ties lm_head\.weight .*two different tensors", loading)


def test_two_equal_tensors_that_the_config_ties_are_one(tmp_path, base_of):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = loading(base_of(edit_weights(tiny_llama(tmp_path, tie=True), copy)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_folder_without_a_tokenizer(tmp_path, base_of):
    refused(base_of(tiny_llama(tmp_path)), r"has no tokenizer that transformers can read", load_tokenizer)
