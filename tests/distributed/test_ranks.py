"""What ranks do together besides steps: held-out losses, saving, mistakes, faults."""

import json
import socket

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F

import trainer.adapters  # noqa: F401 (registers our methods with PEFT)
from data_prep.encode import IGNORED
from tests.distributed.reference import Reference
from tests.distributed.worker import FAULTS, PLACEMENTS
from tests.support import scene
from trainer.base.loader import load_base
from trainer.objective.batches import rows_of_step

pytestmark = pytest.mark.slow
placements = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.mark.ranks_run("held_out")
@placements
def test_held_out_loss_equals_one_process_where_some_ranks_have_no_row_left(seen, base, placement):
    world, folder = seen
    recipe = scene.recipe(base)
    reference, train = Reference(recipe), scene.training_rows(recipe)
    rows = scene.rows(world + 1, seed=9)
    for found in json.loads((folder / placement / "held_out.json").read_text()):
        expected = by_task(reference, rows)
        assert found[1] == expected[1].tolist()
        assert found[0] == pytest.approx(expected[0].tolist(), rel=1e-5)
        reference.train([[train[i] for i in rows_of_step(recipe.run.seed, 0, len(train), 4)]])


@torch.no_grad()
def by_task(reference: Reference, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    sums, counts = torch.zeros(len(scene.TASKS)), torch.zeros(len(scene.TASKS))
    for row in rows:
        inputs = {n: torch.from_numpy(row[n])[None] for n in ("input_ids", "position_ids")}
        logits = reference.model(**inputs, use_cache=False).logits[0, :-1]
        targets = torch.from_numpy(row["labels"][1:])
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        for task in range(len(scene.TASKS)):
            mine = torch.from_numpy(row["task_ids"][1:] == task) & (targets != IGNORED)
            sums[task] += losses[mine].sum()
            counts[task] += mine.sum()
    return sums, counts


@pytest.mark.ranks_run("routers")
@placements
def test_routers_by_task_equal_one_process(seen, base, placement):
    _, folder = seen
    found = json.loads((folder / placement / "routers.json").read_text())
    recipe = scene.recipe(base)
    reference, train = Reference(recipe), scene.training_rows(recipe)
    tokens, weights, entropy = routers_by_task(
        reference, [train[i] for i in rows_of_step(recipe.run.seed, 0, len(train), 4)]
    )
    assert found["tokens"] == tokens.tolist()
    assert (tokens > 0).all()
    torch.testing.assert_close(torch.tensor(found["weights"]), weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["entropy"]), entropy, rtol=0, atol=1e-5)
    matrices = torch.stack([module.interaction.detach() for module in reference.experts.values()])
    torch.testing.assert_close(torch.tensor(found["interaction"]), matrices)


@torch.no_grad()
def routers_by_task(reference: Reference, rows: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [tasks]; mean phi [layers, tasks, k] and its entropy [layers, tasks]: each row alone."""
    phi, ids = [], []
    for row in rows:
        inputs = {n: torch.from_numpy(row[n])[None] for n in ("input_ids", "position_ids")}
        reference.model(**inputs, use_cache=False)
        phi.append(torch.stack([seen[0] for seen in reference.seen_phi.values()]))
        ids.append(torch.from_numpy(row["task_ids"]))
    phi, ids = torch.cat(phi, 1), torch.cat(ids)
    mine = [phi[:, ids == task] for task in range(len(scene.TASKS))]
    entropy = [-(weights * weights.log()).sum(2).mean(1) for weights in mine]
    tokens = torch.tensor([weights.shape[1] for weights in mine])
    return tokens, torch.stack([weights.mean(1) for weights in mine], 1), torch.stack(entropy, 1)


@pytest.mark.ranks_run("saving")
@placements
def test_adapter_saved_from_shards_loads_through_plain_peft_and_gives_the_same(seen, base, placement):
    _, folder = seen
    found = load_file(folder / placement / "outputs.safetensors")
    model = PeftModel.from_pretrained(load_base(scene.recipe(base).base, "cpu"), folder / placement / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits
        answer = model.generate(input_ids=scene.prompt(), max_new_tokens=8, do_sample=False, use_cache=True)
    assert (found["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(found["answer"], answer)


@pytest.mark.ranks_run("mistakes")
def test_a_mistake_that_one_rank_meets_is_raised_by_all(seen):
    world, folder = seen
    found = json.loads((folder / "mistakes.json").read_text())
    assert found["disk"] == ["UserError: the last rank's disk is full"] * world
    assert len(set(found["launch"])) == 1
    assert found["launch"][0].startswith(
        f"UserError: rank {world - 1} on {socket.gethostname()} belongs to another launch than rank 0"
    )


@pytest.mark.ranks_run("mistakes")
def test_any_other_error_of_one_rank_is_told_by_all_and_stays_its_own_there(seen):
    world, folder = seen
    *others, last = json.loads((folder / "mistakes.json").read_text())["crash"]
    assert last == "PermissionError: the last rank cannot look"
    told = f"TrainingFault: rank {world - 1} ended with PermissionError: the last rank cannot look"
    assert others == [told] * (world - 1)


@pytest.mark.ranks_run("faults")
@pytest.mark.parametrize(("stage", "dtype", "chunk", "kind"), FAULTS)
def test_a_loss_or_gradient_that_is_not_finite_stops_every_rank_before_the_weights_move(
    seen, stage, dtype, chunk, kind
):
    world, folder = seen
    text, unmoved = json.loads((folder / "faults.json").read_text())[f"{stage}-{dtype}-{chunk}-{kind}"]
    assert text.startswith(f"step 2: the {kind} is not finite")
    assert kind == "gradient" or f"rank {world - 1}: task" in text
    layer = {"loss": "first layer: ", "gradient": "first at the output of: "}[kind]
    assert f"{layer}rank {world - 1}: {'lm_head' if kind == 'loss' else 'model.norm'};" in text
    assert unmoved
