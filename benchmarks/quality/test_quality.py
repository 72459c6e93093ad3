"""What benchmarks.quality makes of finished cells: choices, means, intervals, tables, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import benchmarks.quality.__main__ as quality
from benchmarks.quality import results
from benchmarks.quality.cell import chosen
from benchmarks.quality.figures import draw
from benchmarks.quality.intervals import Draws, stacked
from benchmarks.quality.page import with_table, write_page
from benchmarks.quality.plan import LEARNING_RATES, SEEDS, TUNING_SEED, compared_cells, trial_cells, tuning_cells
from benchmarks.quality.settings import METHODS, STEPS, TRAINED, TRIALS, Cell, recipe_of
from benchmarks.quality.speed import LOOP, NEW_TOKENS, Side, WithLoop, measure
from benchmarks.quality.tables import Compared, all_tables, numbers
from tests.support.tiny_models import tiny_llama
from trainer.adapters.adapter_config import TeamLoraConfig
from trainer.adapters.attach import attach_adapter
from trainer.adapters.layer import Experts
from trainer.objective.batches import collate

TASKS = {"sums": 5, "dates": 8}
MADE = {"commit": "c1", "recipe": "r1"}
GROUND = {"base_fingerprint": "b1", "prepared_key": "p1"}


def found(level: float, seed: int) -> dict:
    """A cell's result whose scores are `level` on average, with losses that fall with it."""
    noise = np.random.default_rng(seed)
    scores = {task: (level + 0.1 * noise.standard_normal(items)).tolist() for task, items in TASKS.items()}
    return {
        **GROUND,
        "losses": dict.fromkeys(TASKS, 2 - level),
        "scores": scores,
        "metrics": dict.fromkeys(TASKS, "exact_match"),
        "parameters": 1000,
        "train_losses": np.linspace(3, 1, 32).tolist(),
    }


@pytest.fixture
def folder(tmp_path):
    """All tuning cells, one trial of one method, and the compared cells of two seeds; a method's level falls in their
    order, rates do not matter but for the middle one, which is best."""
    for cell in tuning_cells():
        best = cell.learning_rate == LEARNING_RATES[1]
        results.save(cell, {**GROUND, "losses": dict.fromkeys(TASKS, 1.0 if best else 2.0)}, MADE, tmp_path)
    trial = next(cell for cell in trial_cells(dict.fromkeys(TRAINED, LEARNING_RATES[1])) if cell.trial == "alpha4")
    results.save(trial, {**GROUND, "losses": dict.fromkeys(TASKS, 1.25)}, MADE, tmp_path)
    levels = {method: 0.2 + 0.05 * place for place, method in enumerate(METHODS)}
    for cell in compared_cells(dict.fromkeys(TRAINED, LEARNING_RATES[1]), SEEDS[:2]):
        results.save(cell, found(levels[cell.method], cell.seed), MADE, tmp_path)
    return tmp_path


def test_learning_rates_are_those_of_least_validation_loss(folder):
    assert results.best_rates(results.load(folder)) == dict.fromkeys(TRAINED, LEARNING_RATES[1])


def test_a_method_whose_rates_are_not_all_done_has_none(folder):
    (folder / f"{tuning_cells()[0].name}.json").unlink()
    assert set(TRAINED) - set(results.best_rates(results.load(folder))) == {tuning_cells()[0].method}


@pytest.mark.parametrize(
    ("made", "changed", "told"),
    [
        ({"commit": "other"}, {}, "commit"),
        ({"recipe": "other"}, {}, "recipe"),
        ({}, {"base_fingerprint": "other"}, "base"),
        ({}, {"prepared_key": "other"}, "prepared set"),
    ],
)
def test_cells_of_several_commits_recipes_bases_or_sets_are_refused(folder, made, changed, told):
    results.save(Cell("lora", 9, 1e-3), {**found(0.5, 1), **changed}, {**MADE, **made}, folder)
    with pytest.raises(results.MixedResults, match=f"cells of more than one {told} .*other: 1 cells such as lora-k4"):
        results.load(folder)


def test_means_and_leads_are_those_of_the_cells(folder):
    compared = Compared(results.load(folder))
    assert compared.seeds == list(SEEDS[:2])
    by_hand = {}
    for method in ("teamlora", "lora", "moelora"):
        values = [
            np.mean([np.mean(scores) for scores in json.loads(path.read_text())["found"]["scores"].values()])
            for path in folder.glob(f"{method}-k4-data100-*.json")
        ]
        assert len(values) == 2
        by_hand[method] = np.mean(values)
    told = numbers(compared, None)
    assert (told["methods"], told["seeds"]) == (len(METHODS), 2)
    for other in ("lora", "moelora"):
        assert told[f"teamlora_minus_{other}"] == pytest.approx(by_hand["teamlora"] - by_hand[other], abs=1e-4)


def test_tables_have_a_row_a_method_and_pictures_are_drawn(folder, tmp_path):
    compared = Compared(results.load(folder))
    tables = dict(all_tables(compared, None))
    rows = tables["methods"].splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2 : 2 + len(METHODS)]] == [
        m.label for m in METHODS.values()
    ]
    assert "the function of MoELoRA" in rows[-2] and "the function of TeamLoRA" in rows[-1]
    assert tables["experts"].count("(") == 1 + 2 * 4 and tables["data"].count("(") == 3 * 3
    for path in draw(compared, None, tmp_path / "pictures"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_trials_stand_beside_the_cells_that_they_change(folder):
    _heads, _line, *rows = dict(all_tables(Compared(results.load(folder)), None))["trials"].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert cells[0] == ["as in the table above", "1.000", "1.000", "1.000"]
    assert {row[0]: row[1] for row in cells[1:] if len(row) > 1 and row[1]} == {"alpha / rank 4": "1.250"}
    assert [row[0] for row in cells[1:]] == [trial.label for trial in TRIALS.values()]


@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_changes_what_it_says_and_nothing_else(name):
    trial = TRIALS[name]
    for method in trial.methods:
        tried, plain = (
            recipe_of(Cell(method, TUNING_SEED, 1e-3, tuning=True, trial=trial), "base").model_dump()
            for trial in (name, "")
        )
        changed = {f"{part}.{key}" for part in plain for key in plain[part] if tried[part][key] != plain[part][key]}
        assert changed - {"run.name"} == set(trial.settings)


def test_trials_begin_with_the_values_that_they_say():
    def begun(name: str) -> Experts:
        torch.manual_seed(0)
        adapter = Experts(8, 8, TeamLoraConfig(num_experts=4, expert_rank=2))
        with torch.no_grad():
            if TRIALS[name].start:
                TRIALS[name].start(adapter)
        return adapter

    fresh, off = begun("seed"), ~torch.eye(4, dtype=torch.bool)
    assert torch.equal(begun("identity").interaction, torch.eye(4))
    assert torch.equal(begun("router4").router, 4 * fresh.router)
    wide = begun("wide").interaction
    assert torch.equal(wide.diag(), torch.ones(4)) and 0.2 < wide[off].abs().max() <= 0.5
    assert fresh.interaction[off].abs().max() <= 0.1


def test_a_pairs_interval_is_narrow_where_items_differ_alike_and_wide_where_not():
    generator = np.random.default_rng(0)
    theirs = {task: generator.random((3, items)) for task, items in TASKS.items()}
    draws = Draws(TASKS, 3)
    lead = draws.difference({task: scores + 0.25 for task, scores in theirs.items()}, theirs)
    assert [lead.mean, lead.low, lead.high] == pytest.approx([0.25] * 3)
    alone = draws.mean(theirs)
    assert alone.low < alone.mean < alone.high
    assert alone.mean == pytest.approx(np.mean([scores.mean() for scores in theirs.values()]))


def test_an_interval_has_the_width_that_the_variance_of_a_mean_gives():
    """One task, many items, one seed: the bootstrap's interval is the normal one."""
    scores = np.random.default_rng(1).random((1, 400))
    of_mean = Draws({"sums": 400}, 1).mean({"sums": scores})
    assert of_mean.high - of_mean.low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)


def test_seeds_are_stacked_by_task():
    assert {t: a.tolist() for t, a in stacked([{"sums": [1, 0]}, {"sums": [0, 1]}]).items()} == {
        "sums": [[1, 0], [0, 1]]
    }


def test_tuning_takes_the_first_items_of_each_task_and_tests_take_the_others():
    items = [{"task": task, "number": number} for number in range(30) for task in TASKS]
    validation, test = chosen(items, validation=True), chosen(items, validation=False)
    assert {item["number"] for item in validation} == set(range(20))
    assert {item["number"] for item in test} == set(range(20, 30))
    assert len(validation) + len(test) == len(items)


def test_no_compared_cell_has_the_seed_that_rates_were_chosen_on():
    assert all(
        cell.seed != TUNING_SEED for cell in compared_cells(dict.fromkeys(TRAINED, 1e-3)) if cell.method != "base"
    )


def test_a_share_of_the_data_is_the_first_rows_of_the_same_order():
    whole, quarter = (recipe_of(Cell("teamlora", 1, 1e-3, share=share), "base") for share in (100, 25))
    assert (whole.train.steps, quarter.train.steps) == (STEPS, STEPS // 4)
    assert quarter.data == whole.data and quarter.run.seed == whole.run.seed
    assert STEPS * whole.train.global_batch_size < 750  # rows of the prepared set: none is seen twice


def test_hydraloras_matched_rank_is_that_nearest_to_teamloras_parameters():
    shapes = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=64,
    )  # fmt: skip  # SmolLM2-135M's, with one layer

    def parameters(method: str, **changes: int) -> int:
        adapter = recipe_of(Cell(method, 1, 1e-3), "base").adapter.model_copy(update=changes)
        model = attach_adapter(AutoModelForCausalLM.from_config(shapes), adapter)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    wanted = parameters("teamlora")
    by_rank = {rank: abs(parameters("hydralora_matched", expert_rank=rank) - wanted) for rank in range(10, 17)}
    assert min(by_rank, key=by_rank.get) == recipe_of(Cell("hydralora_matched", 1, 1e-3), "base").adapter.expert_rank


def test_the_methods_are_timed_on_models_that_learn(tmp_path):
    tiny_llama(tmp_path)
    rows = np.random.default_rng(0).integers(0, 64, (2, 32))
    batch = collate([{"input_ids": r, "labels": r, "position_ids": range(32), "task_ids": [0] * 32} for r in rows])
    recipes = {method: recipe_of(Cell(method, 0, 1e-3), str(tmp_path)) for method in ("lora", "teamlora", "moelora")}
    sides = {name: Side(name, recipe, batch, 1) for name, recipe in {**recipes, LOOP: recipes["moelora"]}.items()}
    before = {name: [p.detach().clone() for p in side.model.parameters()] for name, side in sides.items()}
    times = measure(sides, 0)
    for name, side in sides.items():
        assert {kind: len(taken) for kind, taken in times[name].items()} == {"step": 2, "prefill": 2, "decode": 2}
        assert side.cache.get_seq_length() == 32 + NEW_TOKENS
        moved = [not torch.equal(p, old) for p, old in zip(side.model.parameters(), before[name], strict=True)]
        assert any(moved) and not any(
            m for m, p in zip(moved, side.model.parameters(), strict=True) if not p.requires_grad
        )
    adapted = sum(isinstance(module, WithLoop) for module in sides[LOOP].model.modules())
    assert adapted == 7 * sides[LOOP].model.config.num_hidden_layers


def test_a_table_takes_the_place_between_its_marks_and_leaves_the_others():
    page = "a\n<!-- data -->\nold\n<!-- end -->\nb\n<!-- tasks -->\nkept\n<!-- end -->\n"
    assert with_table(page, "data", "new\nrow") == page.replace("old", "new\nrow")
    with pytest.raises(ValueError, match="the page has 0 places for the table 'trials'"):
        with_table(page, "trials", "lost")


def test_a_cell_that_fails_keeps_no_other_from_being_run(monkeypatch, capsys):
    cells = tuning_cells()[:3]
    run = []

    def run_cell(cell: Cell, _base: str) -> dict:
        run.append(cell)
        if cell == cells[0]:
            raise quality.FailedCell("its last words")
        return {}

    monkeypatch.setattr(quality, "run_cell", run_cell)
    monkeypatch.setattr(quality, "missing_cells", lambda: cells)
    monkeypatch.setattr(quality, "prepare_for", lambda *_: None)
    monkeypatch.setattr(quality.results, "provenance", lambda **_: MADE)
    monkeypatch.setattr(quality.results, "refuse_mixed", lambda *_: None)
    monkeypatch.setattr(quality.results, "load", dict)
    monkeypatch.setattr(quality.results, "save", lambda *_: None)
    assert not quality.run_missing("base", 1, jobs=1)
    assert run == cells
    told = capsys.readouterr()
    assert "left: 0, failed: 1" in told.out and told.err == "error: its last words\n"
    assert quality.run_missing("base", -1, jobs=1)
    assert "left: 3, failed: 0" in capsys.readouterr().out


def test_no_page_is_written_of_no_whole_seed(tmp_path):
    with pytest.raises(results.MixedResults, match="no seed has cells of all methods"):
        write_page(Compared(results.load(tmp_path)), None)
