"""A mistake in a recipe is reported in one line that names the key, the value and the remedy."""

import re
from pathlib import Path

import pytest

from data_prep.user_error import UserError
from tests.support.minimal_recipe import MINIMAL
from trainer.recipe_file import load_recipe


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, message: str, *overrides: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("adapter.num_expert=3", "adapter.num_expert", "adapter.num_experts"),
        ("base.quantisation=nf4", "base.quantisation", "base.quantization"),
        ("tran.steps=3", "tran", "train"),
        ("steps=3", "steps", "train.steps"),
        ("train={steps: 1, global_batchsize: 8}", "train.global_batchsize", "train.global_batch_size"),
        ("data.sources=[{type: files, task: a, pth: b}]", "data.sources[0].pth", "data.sources[0].path"),
    ],
)
def test_misspelled_key_is_reported_with_the_nearest(path, override, unknown, nearest):
    refused(path, rf"unknown key {re.escape(unknown)}; did you mean {re.escape(nearest)}\?$", override)


def test_key_that_resembles_none_is_reported_with_those_of_its_section(path):
    message = r"unknown key report\.qqq; known keys: report\.tensorboard, report\.router_every$"
    refused(path, message, "report.qqq=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", r"train\.steps='many': input should be a valid integer"),
        ("train.steps=0", r"train\.steps=0: input should be greater than 0"),
        ("train.steps=null", r"train: steps=None and epochs=None: expected exactly one"),
        ("train.epochs=2", r"train: steps=10 and epochs=2\.0: expected exactly one"),
        ("train={global_batch_size: 8, epochs: .inf}", r"train\.epochs=inf: input should be a finite number"),
        ("train={steps: 3}", r"missing key train\.global_batch_size: add it"),
        ("train={steps: 3, global_batch_size: 8, warmup_steps: 1, warmup_ratio: 0.1}", r"warmup_.*; remove one"),
        ("run.name=a/b", r"run\.name='a/b': string should match"),
        ("run.seed=-1", r"run\.seed=-1: input should be greater than or equal to 0"),
        ("report=3", r"report=3: input should be a valid dictionary"),
        ("experts.parallel_size=3", r"parallel_size=3 does not divide adapter\.num_experts=4; use one of 1, 2, 4$"),
        (
            "base={model: m, attention: flash_attention_2, dtype: fp32}",
            r"attention=flash_attention_2 has no kernels for dtype=fp32; set dtype=bf16",
        ),
        ("base={model: m, attention: varlen, dtype: fp32}", r"attention=varlen has no kernels for dtype=fp32"),
        ("checkpoint={load_best_at_end: true, keep_best: false}", r"keep_best=false keeps no best checkpoint; set"),
        ("checkpoint.load_best_at_end=true", r"needs held-out losses on the way; set train\.eval_every, such as 100"),
        ("experts.parallel_size=8", r"parallel_size=8 does not divide adapter\.num_experts=4; use one of 1, 2, 4$"),
        (
            "experts.replicate=true",
            r"experts: replicate and across_nodes need parallel_size > 1; set it or remove them$",
        ),
        ("train.activation_checkpointing=cpu", r"checkpointing='cpu': input should be 'offload' or a valid boolean"),
        ("base.shard_group=x", r"base\.shard_group='x': input should be 'world' or 'node' or a valid integer"),
        ("experts.dispatch=both", r"experts\.dispatch='both': input should be 'auto', 'weights' or 'tokens'"),
        ("adapter.total_rank=30", r"total_rank=30 \(r_A\) is not divisible by num_experts=4; nearest is 32$"),
        ("adapter.total_rank=1", r"total_rank=1 \(r_A\) is not divisible by num_experts=4; nearest is 4$"),
        ("adapter.total_rank=0", r"adapter\.total_rank=0: input should be greater than 0"),
        ("adapter={total_rank: 64, expert_rank: 8}", r"total_rank=64 contradicts num_experts=4 x expert_rank=8"),
        ("adapter.num_experts=null", r"adapter\.num_experts=None: input should be a valid integer"),
        ("adapter.num_experts=2.0", r"adapter\.num_experts=2\.0: input should be a valid integer"),
        ("adapter={expert_rank: null}", r"adapter\.expert_rank=None: input should be a valid integer"),
        ("adapter={method: lora, num_experts: 2}", r"num_experts=2: method lora has one"),
        ("adapter={method: lora, renormalize: true}", r"renormalize=true: method lora has no interaction matrix"),
        ("adapter={method: lora, balance_loss_weight: 0.1}", r"balance_loss_weight: method lora has no router"),
        (
            "data.held_out=-1",
            r"data\.held_out: -1 is neither a fraction .* per task \(such as 100, or 0 to train on all\)",
        ),
        ("data.special_tokens_in_text=keep", r"data\.special_tokens_in_text='keep': .*'encode_as_text', 'allow' or"),
        ("data.held_out=1.0", r"data\.held_out: 1\.0 is neither a fraction .* nor a whole number"),
        ("data.sources=[]", r"data\.sources=\[\]: list should have at least 1 item"),
        ("data.sources=[{type: csv}]", r"data\.sources\[0\]=.*: input tag 'csv' .* 'files', 'hub', 'reasoning_gym'"),
        ("train.steps", r"argument 'train\.steps': expected key\.path=value, for example train\.steps=100"),
        ("run=[", r"argument 'run=\[': the value is not YAML; quote it"),
        ("run.name=" + "[" * 5000, r"argument .*: the value is not YAML; quote it"),
        ("train..steps=3", r"argument 'train\.\.steps=3': expected key\.path=value"),
        ("train.steps.x=3", r"argument 'train\.steps\.x=3': train\.steps is a value, not a section .*; remove \.x$"),
        (
            "data.sources.path=a",
            r"data\.sources is a list of length 1, so path addresses no item; use index 0$",
        ),
        (
            "data.sources.1.path=a",
            r"data\.sources is a list of length 1, so 1 addresses no item; use index 0$",
        ),
        ("data.sources.-1.path=a", r"data\.sources is a list of length 1, so -1 addresses no item; use index 0$"),
        ("data.sources.0.path.x=a", r"data\.sources\.0\.path is a value, not a section with keys; remove \.x$"),
        ("data.seed=2026-13-01", r"argument 'data\.seed=2026-13-01': the value is not YAML; quote it"),
    ],
)
def test_wrong_value_is_reported_in_one_line_with_its_key(path, override, message):
    refused(path, message, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"run: [", r"recipe .*recipe\.yaml: not YAML"),
        (b"- run", r"recipe .*recipe\.yaml: expected sections run, base, \.\.\. at top level"),
        (b"", r"recipe .*recipe\.yaml: expected sections"),
        (b"[" * 5000, r"recipe .*recipe\.yaml: not YAML: more than 40 lists and mappings in each other"),
        (b"run: {name: 2026-13-01}", r"recipe .*recipe\.yaml: not YAML: month must be in 1\.\.12"),
        (b"\xff\xfe", r"recipe .*recipe\.yaml: not a text file"),
    ],
)
def test_file_that_is_no_recipe_is_refused(path, text, message):
    path.write_bytes(text)
    refused(path, message)


def test_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.yaml", r"recipe .*none\.yaml: No such file or directory; give the path of a YAML recipe")


def test_a_method_without_experts_cannot_place_them(path):
    message = r"experts\.parallel_size=2: method lora has no experts to place; set it to 1$"
    refused(path, message, "adapter={method: lora}", "experts.parallel_size=2")


@pytest.mark.parametrize(
    ("override", "length", "message"),
    [
        (
            "data.sources.2.path=a",
            2,
            r"data\.sources is a list of length 2, so 2 addresses no item; use an index from 0 to 1$",
        ),
        ("data.sources.0.path=a", 0, r"data\.sources is an empty list; give it whole, as data\.sources=\[\.\.\.\]$"),
    ],
)
def test_index_out_of_range_is_reported_with_the_length_of_the_list(path, override, length, message):
    sources = ", ".join(["{type: files, task: sums, path: sums.jsonl}"] * length)
    refused(path, message, f"data.sources=[{sources}]", override)
