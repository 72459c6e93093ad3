"""Merged folders: transformers alone computes base plus update, on either base."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data_prep.user_error import UserError
from tests.support.finished_run import finish_run, prepare_tasks
from tests.support.full_disk import files_up_to
from tests.support.tiny_adapters import logits, plain_model
from trainer.base.loader import load_base
from trainer.base.weight_map import open_base
from trainer.evaluation.loaded_models import load_run
from trainer.export.export import ExportRequest, export
from trainer.export.load_exported import load_merged
from trainer.export.lora import LowRank
from trainer.export.merged import write_merged
from trainer.training.run_plan import warnings_about

BF16 = 2.0**-8  # of a value: what rounding to bf16 changes at most


def lora_on(base, run):
    """The run's exported LoRA, by plain PEFT, on a base."""
    folder = run.folder / "export-lora"
    if not folder.exists():
        export(ExportRequest(run.folder, "lora"))
    return PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_into_the_original_it_is_that_base_with_the_lora(make_run, quantization):
    run = make_run(quantization=quantization)
    exported = export(ExportRequest(run.folder, "merged"))
    expected = logits(lora_on(plain_model(run.base), run))
    torch.testing.assert_close(logits(plain_model(exported.folder)), expected, rtol=1e-4, atol=1e-4)


def test_merged_into_the_dequantised_base_it_is_the_nf4_model_with_the_lora(make_run):
    run = make_run(quantization="nf4")
    exported = export(ExportRequest(run.folder, "merged", base="dequantised"))
    expected = logits(lora_on(load_base(run.recipe.base, "cpu"), run))
    found = logits(plain_model(exported.folder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32: sums in another order
    assert (found - logits(lora_on(plain_model(run.base), run))).abs().max() > 0.1
    assert exported.folder.name == "export-merged-dequantised"


@pytest.mark.parametrize("base", ["original", "dequantised"])
def test_a_bf16_run_is_merged_in_bf16_and_rounded_once(make_run, base):
    run = make_run(quantization="nf4", dtype="bf16")
    exported = export(ExportRequest(run.folder, "merged", base=base))
    fp32 = run.recipe.base.model_copy(update={"dtype": "fp32"})
    loaded = load_base(fp32, "cpu") if base == "dequantised" else plain_model(run.base)
    model = lora_on(loaded, run)
    with safe_open(exported.folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a safe_open handle does not iterate)
            value = file.get_tensor(name)
            assert value.dtype == torch.bfloat16
            expected = weight_of(model, name)
            assert ((value.float() - expected).abs() <= BF16 * expected.abs() + 1e-6).all(), name
    assert AutoModelForCausalLM.from_pretrained(exported.folder, dtype="auto").dtype == torch.bfloat16


def weight_of(model, name):
    """A weight of the base model with its LoRA's update, as plain linear algebra."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_base_model().get_submodule(owner)
    linear = getattr(module, "base_layer", module)
    weight = linear.dequantized(torch.float32) if hasattr(linear, "absmax") else getattr(linear, attribute).float()
    if linear is module:
        return weight.detach()
    return (
        weight + module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    ).detach()


def test_in_many_files_it_is_the_same_model(make_run, tmp_path):
    run = make_run()
    opened = open_base(run.recipe.base)
    updates = {"model.layers.1.mlp.up_proj": LowRank(torch.randn(3, 64), torch.randn(96, 3))}
    for name, most in (("one", 10**9), ("many", 60_000)):
        (tmp_path / name).mkdir()
        write_merged(tmp_path / name, opened, updates, shard_bytes=most)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(run_bytes(tmp_path / "many" / name) for name in files)
    assert torch.equal(logits(plain_model(tmp_path / "one")), logits(plain_model(tmp_path / "many")))


def run_bytes(path):
    """What a file's tensors take."""
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


EXTRA = {  # heads for later tokens, under the two kinds of name that families use, in dtypes that stay as they are
    "model.layers.2.eh_proj.weight": torch.randn(64, 128).to(torch.float16),
    "mtp.layers.0.mlp.up_proj.weight": torch.randn(96, 64).to(torch.float8_e4m3fn),
    "mtp.layers.0.counts": torch.arange(3),
    "mtp.layers.0.mask": torch.tensor([True, False]),
    "mtp.scale": torch.tensor(0.5),
}


@pytest.fixture
def run_with_extra_tensors(tmp_path):
    """A run whose base holds tensors that LlamaForCausalLM does not know."""
    folder = prepare_tasks(tmp_path / "extra")
    path = folder / "base" / "model.safetensors"
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # the model computes these
    save_file({**load_file(path), **EXTRA, **frequencies}, path, metadata={"format": "pt"})
    return finish_run(folder, tmp_path / "runs" / "extra")


def test_tensors_that_the_model_does_not_know_are_kept_as_they_are_and_named(run_with_extra_tensors):
    run = run_with_extra_tensors
    exported = export(ExportRequest(run.folder, "merged"))
    found, base = (load_file(folder / "model.safetensors") for folder in (exported.folder, run.base))
    assert found.keys() == base.keys() - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    for name, tensor in EXTRA.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert exported.facts["kept_as_they_are"] == sorted(EXTRA)
    assert "5 tensors that LlamaForCausalLM does not know (model.layers.2.eh_proj.weight, mtp.layers" in exported.what
    expected = logits(lora_on(plain_model(run.base), run))
    torch.testing.assert_close(logits(plain_model(exported.folder)), expected, rtol=1e-4, atol=1e-4)


def test_in_many_files_they_are_in_the_index(run_with_extra_tensors, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    total = write_merged(folder, open_base(run_with_extra_tensors.recipe.base), {}, shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert total == sum(run_bytes(path) for path in folder.glob("*.safetensors")) == index["metadata"]["total_size"]
    for name in EXTRA:
        with safe_open(folder / index["weight_map"][name], "pt") as file:
            assert name in file.keys()  # noqa: SIM118 (a safe_open handle is no mapping)


def test_training_names_them_once(run_with_extra_tensors):
    recipe = run_with_extra_tensors.recipe
    (line,) = warnings_about(recipe, open_base(recipe.base))
    start = (
        "warning: base.model holds 5 tensors that LlamaForCausalLM does not know (model.layers.2.eh_proj.weight, mtp."
    )
    assert line.startswith(start)
    assert line.endswith(", ...); they are neither used nor trained, and merged exports keep them as they are")


def test_tokenizer_and_chat_template_come_along(make_run):
    run = make_run()
    folder = export(ExportRequest(run.folder, "merged")).folder
    found, expected = (AutoTokenizer.from_pretrained(path) for path in (folder, run.base))
    turns = [{"role": "user", "content": "Sort the words"}]
    assert found.apply_chat_template(turns) == expected.apply_chat_template(turns)


def test_a_merged_model_stops_where_its_template_ends_an_answer(make_run):
    run = make_run()
    end = AutoTokenizer.from_pretrained(run.base).convert_tokens_to_ids("<|im_end|>")
    assert end != 7
    config = {"eos_token_id": 7, "repetition_penalty": 1.5, "temperature": 0.5}  # as of older models: without do_sample
    (run.base / "generation_config.json").write_text(json.dumps(config))
    try:
        exported = export(ExportRequest(run.folder, "merged"))
    finally:
        (run.base / "generation_config.json").unlink()
    found = GenerationConfig.from_pretrained(exported.folder)
    assert (found.eos_token_id, found.repetition_penalty) == ([7, end], 1.5)
    assert load_merged(load_run(run.folder), exported.folder).generation_config.repetition_penalty in (None, 1.0)


def test_a_disk_that_refuses_a_file_is_told_in_one_line_and_leaves_nothing(make_run):
    run = make_run()
    with (
        files_up_to(50_000),
        pytest.raises(UserError, match=r"^--output: cannot write .*export-merged .*; give a folder that can"),
    ):
        export(ExportRequest(run.folder, "merged"))
    assert not [path for path in run.folder.iterdir() if "export" in path.name]
