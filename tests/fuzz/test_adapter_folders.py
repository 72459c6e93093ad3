"""Damaged adapter folders: loaded as what they say, or refused in one line before anything large is allocated."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

import trainer.adapters  # noqa: F401 (registers our methods with PEFT)
from tests.fuzz.fuzzing import Outcomes, fuzz
from tests.fuzz.mutations import mutated_trees, values
from tests.support.tiny_adapters import TOKENS, config_of, plain_model, wake
from tests.support.tiny_models import tiny_llama
from trainer.adapters.adapter_folder import load_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEAR = ["up_proj"]
METHODS = ["teamlora", "moelora", "hydralora", "lora"]
DECISIVE = ("peft_type", "num_experts", "expert_rank", "alpha", "dropout", "renormalize", "r", "lora_alpha")


@dataclass(frozen=True)
class Scene:
    """A base, an adapter's folder of each method, and a folder for damaged ones."""

    base: PreTrainedModel
    folders: dict[str, Path]
    damaged: Path

    def config(self, method: str) -> dict[str, Any]:
        return json.loads((self.folders[method] / CONFIG).read_text())

    def tensors(self, method: str) -> dict[str, Tensor]:
        return load_file(self.folders[method] / WEIGHTS)

    def load(self, config: bytes, weights: bytes, outcomes: Outcomes) -> Any | None:
        """The adapted model, which computes finite numbers with the tensors of the file; None where it is refused."""
        (self.damaged / CONFIG).write_bytes(config)
        (self.damaged / WEIGHTS).write_bytes(weights)
        model = outcomes.of(lambda: load_adapter(deepcopy(self.base), self.damaged))
        if model is not None:
            with torch.no_grad():
                assert model.eval()(TOKENS).logits.isfinite().all()
            found = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
            stored = load_file(self.damaged / WEIGHTS)
            assert found.keys() == stored.keys()
            assert all(torch.equal(found[name], stored[name].float()) for name in found)
        return model


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_llama(folder / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=False, task_type="CAUSAL_LM")
    for method in METHODS:
        config = lora if method == "lora" else config_of(method, target_modules=LINEAR)
        model = get_peft_model(plain_model(folder / "base"), config)
        wake(model)
        model.save_pretrained(folder / method)
    (folder / "damaged").mkdir()
    return Scene(plain_model(folder / "base"), {name: folder / name for name in METHODS}, folder / "damaged")


@fuzz(0.004)
@given(content=st.binary(max_size=8) | st.sampled_from([b"[]", b"3", b"null", b"{}", b"[" * 3000]))
@example(content=b"3")
def test_configurations_that_are_none(content, scene, outcomes: Outcomes):
    scene.load(content, save(scene.tensors("teamlora")), outcomes)
    assert outcomes.counts["accepted"] == 0


@fuzz(0.03)
@given(data=st.data())
def test_configurations_with_changed_values(data, scene, outcomes: Outcomes):
    method = data.draw(st.sampled_from(METHODS))
    odd = values("TEAMLORA", "LORA", "all-linear", "(", ".*", LINEAR, 10**6, 2**31 - 1)
    config = data.draw(mutated_trees([scene.config(method)], odd))
    model = scene.load(json.dumps(config).encode(), save(scene.tensors(method)), outcomes)
    if model is not None:
        read = model.peft_config["default"].to_dict()
        for key in DECISIVE:
            if key in config and key in read:
                assert read[key] == config[key] and isinstance(read[key], bool) == isinstance(config[key], bool), key


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("teamlora", {"num_experts": 2**31}),
        ("teamlora", {"expert_rank": 10**9}),
        ("teamlora", {"num_experts": 2**20, "expert_rank": 2**20}),
        ("teamlora", {"num_router_outputs": 10**9}),
        ("moelora", {"num_experts": 10**7}),
        ("hydralora", {"expert_rank": 10**8}),
        ("lora", {"r": 10**9}),
        ("lora", {"rank_pattern": {"up_proj": 10**9}}),
    ],
)
def test_sizes_of_more_than_the_file_holds_are_refused_before_they_are_allocated(
    method, changes, scene, outcomes: Outcomes, monkeypatch
):
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *_, **__: pytest.fail("PEFT would allocate it"))
    scene.load(json.dumps(scene.config(method) | changes).encode(), save(scene.tensors(method)), outcomes)
    assert outcomes.counts["refused"] == 1


@pytest.mark.parametrize("key", ["alpha", "dropout"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308, True, "6", None])
def test_settings_that_are_no_numbers_are_refused(key, value, scene, outcomes: Outcomes):
    config = scene.config("teamlora") | {key: value}
    scene.load(json.dumps(config).encode(), save(scene.tensors("teamlora")), outcomes)
    assert outcomes.counts["refused"] == 1


@pytest.mark.parametrize("key", ["num_experts", "expert_rank", "alpha", "target_modules"])
def test_settings_that_decide_what_is_computed_are_left_to_no_default(key, scene, outcomes: Outcomes):
    config = scene.config("teamlora")
    del config[key]
    scene.load(json.dumps(config).encode(), save(scene.tensors("teamlora")), outcomes)
    assert outcomes.counts["refused"] == 1


@pytest.mark.parametrize("tokens", [-1, [3, 4]])
def test_a_lora_that_begins_after_certain_tokens_is_refused(tokens, scene, outcomes: Outcomes):
    config = scene.config("lora") | {"alora_invocation_tokens": tokens}
    scene.load(json.dumps(config).encode(), save(scene.tensors("lora")), outcomes)
    assert outcomes.counts["refused"] == 1


@st.composite
def damaged_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after one or two of them were left out, renamed, repeated, reshaped, cast or made no numbers."""
    changed = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(changed)))
        tensor = changed[name]
        match draw(st.sampled_from(["remove", "rename", "add", "cut", "turn", "cast", "value", "empty"])):
            case "remove" if len(changed) > 1:
                del changed[name]
            case "rename":
                changed[name.replace("layers.0", "layers.7") + draw(st.sampled_from(["", "x"]))] = changed.pop(name)
            case "add":
                changed[draw(st.sampled_from(["x", f"{name}.x", "base_model.model.lm_head.weight"]))] = tensor.clone()
            case "cut":
                changed[name] = tensor[:-1].contiguous()
            case "turn":
                changed[name] = tensor.movedim(0, -1).contiguous()
            case "cast":
                kind = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
                changed[name] = tensor.to(kind)
            case "value" if tensor.is_floating_point() and tensor.numel():
                number = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
                changed[name] = tensor.clone()
                changed[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = number
            case "empty":
                changed[name] = torch.empty(0)
    return changed


@fuzz(0.03)
@given(data=st.data())
def test_changed_tensors(data, scene, outcomes: Outcomes):
    method = data.draw(st.sampled_from(METHODS))
    tensors = data.draw(damaged_tensors(scene.tensors(method)))
    scene.load(json.dumps(scene.config(method)).encode(), save(tensors), outcomes)


@fuzz(0.02)
@given(data=st.data())
def test_changed_bytes_of_the_tensors(data, scene, outcomes: Outcomes):
    """In the header, or cut short: a changed number in the tensors cannot be told from another one."""
    whole = save(scene.tensors("teamlora"))
    header = 8 + int.from_bytes(whole[:8], "little")
    where = data.draw(st.integers(0, header - 1))
    if data.draw(st.booleans()):
        changed = whole[:where] + data.draw(st.binary(min_size=1, max_size=3)) + whole[where + 1 :]
    else:
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    scene.load(json.dumps(scene.config("teamlora")).encode(), changed, outcomes)


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_adapter_is_accepted(method, scene, outcomes: Outcomes):
    scene.load((scene.folders[method] / CONFIG).read_bytes(), (scene.folders[method] / WEIGHTS).read_bytes(), outcomes)
    assert outcomes.counts["accepted"] == 1
