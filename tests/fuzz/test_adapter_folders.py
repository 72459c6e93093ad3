"""Damaged adapter folders: loaded with finite numbers, or refused in one line, whatever PEFT makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import trainer.adapters  # noqa: F401 (registers our methods with PEFT)
from tests.fuzz.fuzzing import Outcomes, fuzz
from tests.support.tiny_adapters import TOKENS, config_of, plain_model, wake
from tests.support.tiny_models import tiny_llama
from trainer.adapters.adapter_folder import load_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter, and its base beside it."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    tiny_llama(folder / "base", dtype=torch.float32)
    model = get_peft_model(plain_model(folder / "base"), config_of("teamlora", target_modules=["up_proj"]))
    wake(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def load(adapter: Path, config: bytes, tensors: dict[str, torch.Tensor], outcomes: Outcomes, factory: Any) -> None:
    damaged = factory.mktemp("damaged")
    (damaged / CONFIG).write_bytes(config)
    save_file(tensors, damaged / WEIGHTS)
    model = outcomes.of(lambda: load_adapter(plain_model(adapter.parent / "base"), damaged))
    if model is not None:
        with torch.no_grad():
            logits = model.eval()(TOKENS).logits
        assert logits.isfinite().all()
        json.dumps(float(logits.mean()), allow_nan=False)


@fuzz(0.004)
@given(content=st.binary(max_size=8) | st.sampled_from([b"[]", b"3", b"null", b"{}", b"[" * 3000]))
@example(content=b"3")
def test_configurations_that_are_none(content, adapter, outcomes: Outcomes, tmp_path_factory):
    load(adapter, content, load_file(adapter / WEIGHTS), outcomes, tmp_path_factory)
    assert outcomes.counts["accepted"] == 0


@pytest.mark.parametrize("key", ["alpha", "dropout"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_settings_that_are_no_numbers_are_refused(key, value, adapter, outcomes: Outcomes, tmp_path_factory):
    config = json.loads((adapter / CONFIG).read_text()) | {key: value}
    load(adapter, json.dumps(config).encode(), load_file(adapter / WEIGHTS), outcomes, tmp_path_factory)
    assert outcomes.counts["refused"] == 1


def test_the_whole_adapter_is_accepted(adapter, outcomes: Outcomes, tmp_path_factory):
    load(adapter, (adapter / CONFIG).read_bytes(), load_file(adapter / WEIGHTS), outcomes, tmp_path_factory)
    assert outcomes.counts["accepted"] == 1
