"""train.activation_checkpointing: offload moves inputs of decoder layers to the host, and changes no bit of a run."""

import json
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.offload_on_cpu import copied_on_cpu
from tests.support.ranks import run_ranks
from tests.support.tiny_models import FAMILIES, tiny_model
from trainer.distributed.deepspeed_internals import offload_checkpoints

LAYERS = 6
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def model(request, tmp_path):
    sizes = {"num_hidden_layers": LAYERS}
    if request.param == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    folder = tiny_model(tmp_path / "base", request.param, **sizes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def gradients(model, context):
    """{name: gradient} and the loss of one forward and backward in the context."""
    model.zero_grad()
    with context:
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_the_inputs_of_all_layers_but_the_last_leave_the_device_and_come_back_with_the_same_bits(model):
    plain = gradients(model, nullcontext())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with copied_on_cpu():
        offload = offload_checkpoints(model)
        for _ in range(2):  # as micro-batches enter it
            assert equal(gradients(model, offload), plain)
            assert (offload.stats.offloaded_tensors, offload.stats.restored_tensors) == (LAYERS - 1, LAYERS - 1)
            assert offload.stats.kept_last_tensors == 1


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_an_input_that_came_back_is_freed_once_its_layer_is_done(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    make, made, alive = torch.empty_strided, [], []

    def watched(*args, **kwargs):
        tensor = make(*args, **kwargs)
        made.append(weakref.ref(tensor))
        alive.append(sum(ref() is not None for ref in made))
        return tensor

    with copied_on_cpu(), mock.patch.object(torch, "empty_strided", watched):
        gradients(model, offload_checkpoints(model))
    assert len(made) == LAYERS - 1 and max(alive) <= 2


@pytest.fixture(scope="module", params=[1, 2], ids=lambda world: f"{world}ranks")
def folder(request, base, tmp_path_factory):
    """What the ranks left of a run under each value, with ZeRO-3."""
    folder = tmp_path_factory.mktemp("checkpointing")
    run_ranks(request.param, ["-m", "tests.distributed.worker", str(base), str(folder), "checkpointing"])
    return folder


@pytest.mark.slow
def test_losses_gradients_and_adapters_are_those_of_a_run_without(folder):
    runs = {value: json.loads((folder / value / "values.json").read_text()) for value in ("False", "True", "offload")}
    assert [run.pop("offloaded") for run in runs.values()] == [[[0, 0]] * 2, [[0, 0]] * 2, [[2, 2]] * 2]
    assert runs["False"] == runs["True"] == runs["offload"]
    for name in ("gradients-1", "before-2", "gradients-2"):
        found = {value: load_file(folder / value / f"{name}.safetensors") for value in runs}
        assert all(gradient.any() for gradient in found["False"].values())
        assert equal(found["offload"], found["False"]) and equal(found["True"], found["False"]), name
