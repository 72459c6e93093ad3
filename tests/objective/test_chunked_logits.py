"""The loss with logits a chunk at a time against whole logits and autograd, for every family of models."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import scene
from tests.support.tiny_adapters import adapted
from tests.support.tiny_models import FAMILIES, tiny_llama, tiny_model
from trainer.adapters.router_stats import RouterStats
from trainer.objective.batches import Batch, collate, empty_batch
from trainer.objective.chunked_logits import CHUNK_BYTES, ChunkedLogits, default_chunk, token_losses
from trainer.objective.logits_tail import find_logits_tail
from trainer.objective.loss import LabelledLoss, loss_chunk
from trainer.objective.packed_forward import packed_forward
from trainer.training.run_plan import warnings_about

LABELLED, SCALE = 50, 6.0
# what each does to logits that others do not, beside soft-capping and scaling among FAMILIES
MORE_FAMILIES = {"cohere": {"logit_scale": 0.25}, "cohere2": {"logit_scale": 0.5}, "gpt_neox": {}, "mixtral": {}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


def model_of(folder, dtype=torch.float32):
    """Adapted, its base frozen, in training mode."""
    return adapted(folder, "teamlora", dtype, target_modules="all-linear")


@contextmanager
def watched_hidden(model):
    """What the head is given in the forwards within, before any position is chosen: [batch, seq, d]."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    yield seen
    hook.remove()


def gradients_of(loss, model, hidden):
    """Of the hidden states, then of the parameters that learn."""
    return torch.autograd.grad(loss, [*hidden, *(p for p in model.parameters() if p.requires_grad)])


def loss_of(model, batch: Batch, chunk: int):
    """(loss, sums by task, gradients) as LabelledLoss gives them."""
    stats = RouterStats(model, len(scene.TASKS))
    stats.begin_step(int((batch["task_ids"] >= 0).sum()), measure=True)
    stats.begin_micro_batch(batch["task_ids"])
    with watched_hidden(model) as hidden:
        loss, by_task = LabelledLoss(model, stats, len(scene.TASKS), chunk)(batch, LABELLED, SCALE)
    return loss, by_task, gradients_of(loss, model, hidden)


def by_whole_logits(model, batch: Batch):
    """The same from the logits of every position and autograd."""
    documents = {name: batch[name] for name in ("input_ids", "position_ids")}
    with watched_hidden(model) as hidden:
        logits = model(**documents, use_cache=False).logits[:, :-1].float()
    labels, tasks = batch["labels"][:, 1:], batch["task_ids"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    here = [(labels != -100) & (tasks == task) for task in range(len(scene.TASKS))]
    sums = [losses[mask.flatten()].sum() for mask in here]
    loss = torch.stack(sums).sum() / LABELLED * SCALE
    counts = torch.tensor([mask.sum() for mask in here])
    return loss, torch.stack(sums), counts, gradients_of(loss, model, hidden)


def error(found, expected):
    """Of all tensors of a list taken together, relative."""
    one, other = (torch.cat([tensor.flatten().float() for tensor in tensors]) for tensors in (found, expected))
    return ((one - other).norm() / other.norm()).item()


def assert_same_gradients(found, expected):
    """Those of the hidden states to 1e-6. On the way to the parameters the decoder multiplies what remains."""
    assert error(found[:1], expected[:1]) <= 1e-6
    assert error(found, expected) <= 1e-5


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_losses_and_gradients_of_every_family_are_those_of_whole_logits(tmp_path, family, tie):
    model = model_of(tiny_model(tmp_path, family, tie=tie, **MORE_FAMILIES.get(family, {})))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie
    batch = collate(scene.rows(3, seed=4))
    loss, sums, counts, gradients = by_whole_logits(model, batch)
    assert counts.sum() > 2 * 7
    assert ChunkedLogits(model, 7).chunk == 7, "this family takes chunks"
    found, by_task, found_gradients = loss_of(model, batch, 7)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(by_task.loss, sums, rtol=1e-6, atol=0)
    assert by_task.labelled_tokens.tolist() == counts.tolist()
    assert_same_gradients(found_gradients, gradients)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_of_any_size_give_the_gradients_of_whole_logits(llama, chunk):
    model, batch = model_of(llama), collate(scene.rows(2, seed=8))
    *_, whole = by_whole_logits(model, batch)
    *_, found = loss_of(model, batch, chunk)
    assert_same_gradients(found, whole)


def test_bf16_gradients_are_as_near_to_fp32_as_those_of_whole_logits(tmp_path):
    folder, batch = tiny_model(tmp_path, "gemma2", vocab_size=2048), collate(scene.rows(4, seed=4))
    *_, exact = by_whole_logits(model_of(folder), batch)
    away = {}
    for chunk in (0, 16):
        *_, found = loss_of(model_of(folder, dtype=torch.bfloat16), batch, chunk)
        away[chunk] = error(found, exact)
    assert away[16] <= 1.1 * away[0]


def test_without_gradients_the_sums_are_the_same(llama):
    model, batch = model_of(llama), collate(scene.rows(3, seed=4))
    _, sums, counts, _ = by_whole_logits(model, batch)
    with torch.no_grad():
        _, by_task = LabelledLoss(model, RouterStats(model, 3), 3, 4)(batch, 1, 1.0)
    torch.testing.assert_close(by_task.loss, sums, rtol=1e-6, atol=0)
    assert by_task.labelled_tokens.tolist() == counts.tolist()


def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients_of_zero(llama):
    loss, by_task, gradients = loss_of(model_of(llama), empty_batch(), 4)
    assert loss.item() == 0 and by_task.labelled_tokens.sum() == 0
    assert all(not gradient.any() for gradient in gradients)


def test_each_loss_has_its_own_gradient(llama):
    """Also where losses are weighed, which the trainer does not do."""
    model, batch = model_of(llama), collate(scene.rows(2, seed=4))
    weights = torch.linspace(-1, 2, len(batch["predicting"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    targets = batch["labels"].flatten()[batch["predicting"] + 1]
    found = []
    for chunk in (0, 6):
        losses = ChunkedLogits(model, chunk).cross_entropy(packed_forward(model, batch), batch["predicting"], targets)
        found.append(torch.autograd.grad(losses @ weights, trained))
    assert error(*found) <= 1e-5


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("chunk", [0, 4])
def test_no_more_logits_exist_than_a_chunk_has(tmp_path, chunk):
    model, batch = model_of(tiny_llama(tmp_path, vocab_size=5000)), collate(scene.rows(3, seed=4))
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight[:400]  # smaller than the logits
    with LargestTensor() as largest:
        loss_of(model, batch, chunk)
    head = model.get_output_embeddings().weight.numel()
    tokens = chunk or len(batch["predicting"])
    # the transposed head is a view of the whole weight
    assert largest.elements == max(head, tokens * 5000)


def test_the_head_runs_once_and_is_left_as_it_was(llama):
    model, batch = model_of(llama), collate(scene.rows(3, seed=4))
    head = model.get_output_embeddings()
    inputs = []
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].shape))
    loss_of(model, batch, 4)
    assert inputs == [(*batch["input_ids"].shape, 64)], "ZeRO-3 gathers the head's weight in such a hook"
    hook.remove()
    assert "forward" not in vars(head) and not head._forward_pre_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 512)


def test_a_head_that_learns_gets_its_gradient_from_whole_logits(llama):
    model, batch = model_of(llama), collate(scene.rows(2, seed=4))
    model.get_output_embeddings().requires_grad_()
    *_, whole = by_whole_logits(model, batch)
    *_, found = loss_of(model, batch, 4)
    assert_same_gradients(found, whole)


def test_values_and_logits_by_chunk_are_those_of_whole_logits(llama):
    model, batch = model_of(llama).eval(), collate(scene.rows(2, seed=4))
    positions = batch["predicting"]
    with torch.no_grad():
        whole = packed_forward(model, batch)().logits.flatten(0, 1)[positions]
        logits = ChunkedLogits(model, 6)
        best = logits.map(packed_forward(model, batch), positions, lambda found, _: found.argmax(-1))
        parts = list(logits.split(packed_forward(model, batch), positions, 6))
    assert torch.equal(best, whole.argmax(-1))
    assert {len(part) for part in parts[:-1]} == {6}
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-5)


def test_a_class_that_needs_more_than_its_decoders_output_takes_whole_logits(tmp_path):
    """OPT asks its decoder's child."""
    options = {"word_embed_proj_dim": 64, "ffn_dim": 96, "do_layer_norm_before": True}
    model = model_of(tiny_model(tmp_path, "opt", **options)).eval()
    opt = model.get_base_model()
    assert find_logits_tail(model) is None
    batch = collate(scene.rows(2, seed=4))
    logits = ChunkedLogits(model, 4)
    assert logits.chunk == 0
    targets = batch["labels"].flatten()[batch["predicting"] + 1]
    forward = partial(model, input_ids=batch["input_ids"], use_cache=False)
    found = logits.cross_entropy(forward, batch["predicting"], targets)
    whole = forward().logits.flatten(0, 1)[batch["predicting"]]
    torch.testing.assert_close(found, token_losses(whole, targets))
    parts = list(logits.split(forward, batch["predicting"], 5))
    torch.testing.assert_close(torch.cat(parts), whole)
    warned = warnings_about(scene.recipe("unused", train__loss_chunk=4), SimpleNamespace(model=opt, unplaced=[]))
    assert warned == [
        "warning: train.loss_chunk: OPTForCausalLM computes logits in a way that allows no chunks; the loss holds "
        "those of all labeled tokens of a micro-batch"
    ]
    assert warnings_about(scene.recipe("unused"), SimpleNamespace(model=opt, unplaced=[])) == []


@pytest.mark.parametrize(("vocabulary", "tokens"), [(152_064, 110), (128_256, 130), (32_000, 524), (10**9, 1)])
def test_a_chunks_logits_take_up_to_64_mib(vocabulary, tokens):
    assert default_chunk(vocabulary) == tokens
    assert tokens == 1 or tokens * vocabulary * 4 <= CHUNK_BYTES < (tokens + 1) * vocabulary * 4


@pytest.mark.parametrize(
    ("given", "rows", "chunk"),
    [(None, 1, 0), (None, 3, 130), (0, 3, 0), (16, 1, 16), (64, 1, 0), (65, 1, 0), (64, 2, 64)],
)
def test_chunks_are_used_where_a_micro_batch_can_have_more_tokens(given, rows, chunk):
    """Rows have 64 tokens."""
    changes = {"train__loss_chunk": given, "train__micro_batch_size": rows, "train__global_batch_size": rows}
    assert loss_chunk(scene.recipe("unused", **changes), 128_256) == chunk
