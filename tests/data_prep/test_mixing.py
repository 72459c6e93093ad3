"""Mixing: shares by the formulas, the requested length, equal draws of every document, and a reproducible order."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import MixingConfig
from data_prep.mixing import draw, task_shares
from data_prep.prepare import prepare
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from data_prep.workers import DOCUMENT
from tests.data_prep.test_prepare import documents_in
from tests.data_prep.test_prepared_folder import snapshot
from tests.support.minimal_recipe import MINIMAL
from trainer.recipe_file import dump_recipe, load_recipe

SIZES = {"sums": 9000, "words": 900, "maps": 100}
TASKS = list(SIZES)


def documents(sizes: dict[str, int] = SIZES, seed: int = 0, tokens: int | None = None) -> np.ndarray:
    """DOCUMENT [sum of sizes] with random digests, and by default lognormal lengths (median 200)."""
    rng = np.random.default_rng(seed)
    count = sum(sizes.values())
    made = np.zeros(count, DOCUMENT)
    made["task"] = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    made["high"], made["low"] = rng.integers(0, 2**64, (2, count), dtype=np.uint64)
    made["tokens"] = np.ceil(rng.lognormal(math.log(200), 1, count)) if tokens is None else tokens
    made["number"] = np.arange(count)
    return made


def draws_by_task(every: np.ndarray, indices: np.ndarray) -> dict[str, int]:
    counts = Counter(every["task"][indices].tolist())
    return {task: counts[index] for index, task in enumerate(TASKS)}


def assert_shares(found: dict[str, int], formula: dict[str, float]) -> None:
    """Each task's share of the draws is within 1 % of the formula's, which is relative to the others'."""
    total = sum(formula.values())
    for task, part in formula.items():
        assert found[task] / sum(found.values()) == pytest.approx(part / total, rel=0.01)


ENOUGH = 100_000 / sum(SIZES.values())  # epochs, for 100,000 draws


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (3, 1, 50)], ids=str)
def test_weights_set_the_shares_whatever_the_sizes(weights):
    weights = dict(zip(TASKS, weights, strict=True))
    every = documents()
    indices, _ = draw(every, TASKS, MixingConfig(weights=weights, epochs=ENOUGH))
    assert len(indices) == 100_000
    assert_shares(draws_by_task(every, indices), weights)


@pytest.mark.parametrize("temperature", [None, 0.7, 1.0, 2.0, 5.0, 1e6])
def test_temperature_sets_the_shares_by_a_root_of_the_sizes(temperature):
    every = documents()
    indices, _ = draw(every, TASKS, MixingConfig(temperature=temperature, epochs=ENOUGH))
    assert len(indices) == 100_000
    formula = {task: math.exp(math.log(size) / (temperature or 1)) for task, size in SIZES.items()}
    assert_shares(draws_by_task(every, indices), formula)


def test_a_cap_bounds_the_documents_used_and_counts_in_the_shares():
    every = documents()
    mixing = MixingConfig(caps={"sums": 400, "maps": 5000}, temperature=2, epochs=100_000 / 1400)
    indices, _ = draw(every, TASKS, mixing)
    assert len(indices) == 100_000
    assert_shares(draws_by_task(every, indices), {"sums": 400**0.5, "words": 900**0.5, "maps": 100**0.5})
    used = every[np.unique(indices)]
    assert Counter(used["task"].tolist()) == {0: 400, 1: 900, 2: 100}


def test_a_cap_takes_documents_of_the_whole_source_and_a_higher_one_only_adds():
    used = []
    for cap in (400, 500):
        indices, _ = draw(documents(), TASKS, MixingConfig(caps={"sums": cap}))
        used.append({index for index in indices.tolist() if index < SIZES["sums"]})
    assert used[0] < used[1]
    assert abs(np.mean(sorted(used[0])) - 4500) < 5 * 9000 / math.sqrt(12 * 400)  # five standard errors


@pytest.mark.parametrize("epochs", [0.5, 1, 2.25, 3])
@pytest.mark.parametrize("weights", [{}, {"sums": 1, "words": 2, "maps": 1}], ids=["as they are", "weighted"])
def test_a_task_has_every_document_once_before_any_twice(epochs, weights):
    every = documents()
    indices, again = draw(every, TASKS, MixingConfig(epochs=epochs, weights=weights))
    assert len(indices) == round(epochs * 10_000)
    times = np.bincount(indices, minlength=len(every))
    for task in range(len(TASKS)):
        own = times[every["task"] == task]
        assert own.max() - own.min() <= 1
    drawn = Counter(zip(indices.tolist(), again.tolist(), strict=True))
    assert drawn == Counter((index, k) for index, count in enumerate(times.tolist()) for k in range(count))


@pytest.mark.parametrize("weights", [{}, {"sums": 1, "words": 2, "maps": 1}], ids=["as they are", "weighted"])
@pytest.mark.parametrize("budget", [50_000, 1_000_000, 12_345_678])
def test_a_token_budget_is_met_within_one_document_per_task(budget, weights):
    every = documents()
    indices, _ = draw(every, TASKS, MixingConfig(token_budget=budget, weights=weights))
    tokens = every["tokens"].astype(int)
    longest = sum(tokens[every["task"] == task].max() for task in range(len(TASKS)))
    assert budget - longest < tokens[indices].sum() <= budget
    shares = weights or SIZES
    for task, count in draws_by_task(every, indices).items():
        assert abs(count - len(indices) * shares[task] / sum(shares.values())) < 1


def test_draws_of_a_document_are_spread_and_tasks_are_mixed_throughout():
    every = documents()
    indices, again = draw(every, TASKS, MixingConfig(epochs=3))
    places = np.argsort(indices, kind="stable").reshape(len(every), 3)  # of each document's draws
    assert np.diff(places, axis=1).min() > 0.01 * len(indices)
    assert np.corrcoef(np.arange(len(again)), again)[0, 1] == pytest.approx(0, abs=0.02)  # passes are mixed
    for tenth in np.split(every["task"][indices], 10):
        for task, size in enumerate(SIZES.values()):
            expected = len(tenth) * size / 10_000
            assert abs(np.count_nonzero(tenth == task) - expected) < 5 * math.sqrt(expected)


def test_the_order_depends_on_the_texts_not_on_the_sources():
    every = documents()
    mixing = MixingConfig(epochs=1.7, temperature=2)
    indices, again = draw(every, TASKS, mixing)
    shuffled = every[np.random.default_rng(1).permutation(len(every))]
    others, others_again = draw(shuffled, TASKS, mixing)
    assert every["number"][indices].tolist() == shuffled["number"][others].tolist()
    assert again.tolist() == others_again.tolist()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epochs": 1e-9}, r"^data\.mixing: 0 draws in total leave none for task 'sums'; raise epochs or token_budget"),
        ({"weights": {"sums": 1, "words": 1, "maps": 1e-9}}, r"^data\.mixing: 10000 draws .* none for task 'maps'"),
        ({"token_budget": 9}, r"^data\.mixing: 0 draws in total leave none for task 'sums'"),
    ],
    ids=["epochs", "weight", "budget"],
)
def test_a_task_without_draws_is_refused(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        draw(documents(tokens=10), TASKS, MixingConfig(**keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ("{weights: {sums: 1}}", r"data: mixing\.weights has none for task 'words'; give every task one$"),
        ("{weights: {sums: 1, words: 1, maps: 1}}", r"data: mixing\.weights names 'maps'; the tasks are sums, words$"),
        ("{caps: {maps: 1}}", r"data: mixing\.caps names 'maps'; the tasks are sums, words$"),
        ("{weights: {sums: 1, words: 1}, temperature: 2}", r"data\.mixing: has both weights and temp.*; remove one$"),
        ("{epochs: 2, token_budget: 9}", r"data\.mixing: has both epochs and token_budget, .*; remove one$"),
        ("{weights: {sums: 0, words: 1}}", r"data\.mixing\.weights\.sums=0: input should be greater than 0"),
        ("{temperature: 0}", r"data\.mixing\.temperature=0: input should be greater than 0; change it$"),
        ("{temperature: .inf}", r"data\.mixing\.temperature=inf: input should be a finite number; change it$"),
        ("{epochs: 0}", r"data\.mixing\.epochs=0: input should be greater than 0; change it$"),
        ("{caps: {sums: 0}}", r"data\.mixing\.caps\.sums=0: input should be greater than 0; change it$"),
        ("{weigths: {sums: 1}}", r"unknown key data\.mixing\.weigths; did you mean data\.mixing\.weights\?$"),
    ],
)
def test_contradictory_mixing_options_give_a_one_line_error(tmp_path, mixing, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL)
    sources = "[{type: files, task: sums, path: a.jsonl}, {type: files, task: words, path: b.jsonl}]"
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(recipe, [f"data.sources={sources}", f"data.mixing={mixing}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mixing", [{"token_budget": 5000}, {"epochs": 2.0}, {}])
def test_a_recipe_with_mixing_reads_back_as_it_was_written(tmp_path, mixing):
    recipe = load_recipe(Path("launch/recipes/quickstart.yaml"), [f"data.mixing={json.dumps(mixing)}"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml", []) == recipe


@pytest.mark.parametrize(("key", "value", "said"), [("token_budget", 10**15, "GiB of memory"), ("epochs", 1e6, "GiB")])
def test_draws_that_memory_cannot_hold_are_refused(config_of, tokenizer, monkeypatch, key, value, said):
    monkeypatch.setattr("data_prep.mixing.available_memory", lambda: 2**28)
    config = config_of(mixing={key: value})
    with pytest.raises(
        UserError, match=rf"^data\.mixing: [\d,]+ draws from [\d,]+ documents need [\d.]+ {said}"
    ) as caught:
        prepare(config, tokenizer)
    assert "\n" not in str(caught.value)
    assert not config.prepared_dir.exists()


def test_a_low_temperature_gives_the_largest_task_nearly_all():
    assert task_shares(np.array([1000, 20]), ["a", "b"], MixingConfig(temperature=0.005)).tolist() == [1.0, 0.0]


def test_a_mixed_set_is_the_same_to_the_byte_and_another_seed_gives_another_order(config_of, tokenizer, tmp_path):
    mixing = {"weights": {"sums": 1, "words": 3}, "epochs": 2.5}
    config = config_of(mixing=mixing)
    manifest = prepare(config, tokenizer).manifest
    first = snapshot(config.prepared_dir)
    config.prepared_dir.rename(tmp_path / "old")
    prepare(config, tokenizer)
    assert snapshot(config.prepared_dir) == first

    # 2.5 draws for each of the 10 + 6 training documents: 40, a quarter of them sums
    documents = documents_in(open_prepared(config, tokenizer).train)
    times = Counter((int(d["task_ids"][0]), d["input_ids"].tobytes()) for d in documents)
    assert sorted(count for (task, _), count in times.items() if task == 0) == [1] * 10
    assert sorted(count for (task, _), count in times.items() if task == 1) == [5] * 6
    counts = {task: found["documents"] for task, found in manifest["splits"]["train"]["tasks"].items()}
    assert counts == {"sums": 10, "words": 30}

    other = config_of(mixing=mixing, seed=1, prepared_dir=tmp_path / "other")
    prepare(other, tokenizer)
    assert snapshot(other.prepared_dir)["train/data-00000-of-00001.arrow"] != first["train/data-00000-of-00001.arrow"]
