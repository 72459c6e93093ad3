"""Held-out documents out of packed rows, and their scores and routers' use, against loops over whole logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.scene import TASKS, rows
from tests.support.tiny_adapters import METHODS, adapted
from tests.support.tiny_models import tiny_llama
from trainer.adapters.router_observer import find_experts, observe_routers
from trainer.analysis.document_scores import first_documents, score
from trainer.analysis.router_usage import RouterUsageCollector

TASK_COUNT = len(TASKS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def documents():
    return first_documents(rows(12, seed=2), TASK_COUNT, 4)


def test_documents_are_cut_where_positions_begin_anew_and_the_first_of_each_task_are_taken():
    packed = rows(12, seed=2)
    expected = {task: [] for task in range(TASK_COUNT)}
    for row in packed:
        second = int(np.flatnonzero(row["position_ids"] == 0)[1])
        for part in (slice(0, second), slice(second, None)):
            expected[int(row["task_ids"][part][0])].append(row["input_ids"][part].tolist())
    found = {task: [] for task in range(TASK_COUNT)}
    for document in first_documents(packed, TASK_COUNT, 4):
        assert len(set(document["task_ids"])) == 1
        found[int(document["task_ids"][0])].append(document["input_ids"].tolist())
    assert found == {task: texts[:4] for task, texts in expected.items()}


def test_documents_without_labels_are_passed_over():
    assert len(first_documents(rows(2, seed=2, unlabelled=(0,)), TASK_COUNT, 4)) == 2


@torch.no_grad()
def test_scores_are_those_of_each_document_alone_with_whole_logits(llama, documents):
    model = adapted(llama, "teamlora").eval()
    for document in documents[::2]:  # half of them the model gets right
        logits = model(input_ids=torch.from_numpy(document["input_ids"])[None]).logits[0]
        labelled = np.flatnonzero(document["labels"] != -100)
        document["labels"][labelled] = logits.argmax(-1).numpy()[labelled - 1]
    scores = score(model, documents)
    for index, document in enumerate(documents):
        logits = model(input_ids=torch.from_numpy(document["input_ids"])[None]).logits[0, :-1]
        targets = torch.from_numpy(document["labels"][1:])
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        assert scores.loss[index] == pytest.approx(loss, rel=1e-4)
        assert scores.labelled_tokens[index] == (targets != -100).sum()
        assert scores.exact[index] == all(logits.argmax(-1)[targets != -100] == targets[targets != -100])
    assert scores.exact.sum() == len(documents[::2])
    assert scores.mean_loss() == pytest.approx(scores.loss.sum() / scores.labelled_tokens.sum())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_use_is_that_of_a_loop_over_tokens(llama, documents, method):
    model = adapted(llama, method).eval()
    adapters = find_experts(model)
    collector = RouterUsageCollector(list(adapters.values()), TASK_COUNT)
    with observe_routers(model, collector.observe):
        score(model, documents, on_batch=collector.begin_batch)
    use = collector.usage()
    inputs = {}
    for name, module in adapters.items():
        module.register_forward_hook(lambda _m, args, _out, name=name: inputs.update({name: args[0][0]}))
    phi, omega, leads, entropy = (np.zeros(s.shape) for s in (use.phi, use.omega, use.leads, use.entropy))
    tokens = np.zeros(TASK_COUNT)
    for document in documents:
        model(input_ids=torch.from_numpy(document["input_ids"])[None])
        task = document["task_ids"][0]
        tokens[task] += len(document["input_ids"])
        for index, (name, module) in enumerate(adapters.items()):
            for x in inputs[name]:
                weights = torch.softmax(module.router @ x, 0)
                after = weights if module.interaction is None else module.interaction @ weights
                phi[index, task] += weights.numpy()
                omega[index, task] += after.numpy()
                leads[index, task, after.argmax()] += 1
                entropy[index, task] -= float(weights @ weights.log())
    assert use.tokens.tolist() == tokens.tolist()
    for found, expected in ((use.phi, phi), (use.omega, omega), (use.leads, leads), (use.entropy, entropy)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    numbers = use.as_json(list(adapters), TASKS)
    first = numbers["leading_share_by_task"][TASKS[0]]
    assert first == pytest.approx((leads[:, 0] / tokens[0]).mean(0), abs=1e-3)
    assert numbers["entropy_share"] == pytest.approx(entropy.sum() / tokens.sum() / len(adapters) / np.log(4), rel=1e-4)
