"""Damaged recipes and overrides: accepted as what they say, or refused in one line."""

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.user_error import UserError
from tests.fuzz.fuzzing import Outcomes, fuzz, writes_nothing
from tests.fuzz.mutations import YAML_SCALARS, at, leaves, mutated_bytes, mutated_texts, mutated_trees, values
from tests.support.minimal_recipe import MINIMAL
from trainer.objective.batches import plan_batches, rows_of_step, steps_in
from trainer.objective.optimizer import check_warm_up
from trainer.recipe import Recipe
from trainer.recipe_file import dump_recipe, load_recipe

REPOSITORY = Path(__file__).parent.parent.parent
FILES = [*sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml")), REPOSITORY / "tests" / "golden" / "recipe.yaml"]
TEXTS = [MINIMAL, *(path.read_text() for path in FILES)]
TREES = [yaml.safe_load(text) for text in TEXTS]
KEYS = sorted({".".join(map(str, path)) for tree in TREES for path, _ in leaves(tree)} | {
    "run.start_timeout", "run.collective_timeout", "run.nodes", "adapter.total_rank", "train.epochs", "train.betas",
    "train.resume", "data.mixing.weights", "data.mixing.caps", "data.cleaning.near_duplicates", "experts.parallel_size",
    "checkpoint.keep_every", "report.router_every", "data.chat_template", "adapter.init_from", "train.warmup_ratio",
})  # fmt: skip
FRAGMENTS = [
    "1:30", "010", "1e308", "1e400", "-1", "0", "true", "off", "~", "''", '"\\0"', '"\\u2028"', '"a\\nb"', "!!int abc",
    "!!float x", "!!bool 3", "!!null x", "!!binary @", "!!timestamp x", "!!omap 3", "!!pairs [a]", "!!set [a]", "!a b",
    "!!python/object:os.system", "2026-13-01", "2026-01-01", "2026-02-30 12:00:00", "9" * 5000, "-" + "1" * 5000, "0b",
    "0x", "0o8", "0b2", "1_000", "_", "[" * 3000, "{a: " * 1500, "- " * 1500, "&a [*a]", "*missing", "<<: *a",
    "<<: [1]", "<<: {run: 1}", "? [a]\n: b", "? {a: b}", "{[a]: b}", "@", "`", "%YAML 9.9", "---", "...", "\t", "|",
    ">", "- a", "{", "}", ", ", "#", "\0", "\x85", "\u2028", "\ud800", "\ufeff", "'", '"', "key: value",
    "18446744073709551616", "1000000000000", "100000000000000000000", ".inf", ".nan", "0.0000000001", "run: {name: b}",
    "train:\n  steps: 3",
]  # fmt: skip

recipe_trees = mutated_trees(TREES, values(*YAML_SCALARS))
recipe_files = mutated_bytes(mutated_texts(TEXTS, FRAGMENTS))


def test_each_base_is_accepted(tmp_path):
    for text in TEXTS:
        (tmp_path / "recipe.yaml").write_text(text)
        check_that_it_can_be_used(load_recipe(tmp_path / "recipe.yaml"))


@fuzz(0.2)
@given(tree=recipe_trees)
def test_recipes_with_changed_values(tree, outcomes: Outcomes, tmp_path_factory):
    path = folder_of(tmp_path_factory) / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    recipe = load(path, [], outcomes)
    if recipe is not None:
        for at_path, given_value in leaves(tree):
            check_nothing_else_is_read(at_path, given_value, recipe)


@fuzz(0.2)
@given(content=recipe_files)
@example(content=(MINIMAL + "train: {steps: 3, global_batch_size: 8}\n").encode())
def test_recipes_with_changed_text(content, outcomes: Outcomes, tmp_path_factory):
    path = folder_of(tmp_path_factory) / "recipe.yaml"
    path.write_bytes(content)
    load(path, [], outcomes)


FATAL_LATER = [
    f"run.seed={2**64}", "run.start_timeout=1e308", "run.collective_timeout=1e300",
    'run.output_dir="a\\0b"', 'data.sources.0.path="\\ud800"', "adapter.expert_rank=1000000000000",
    "adapter.total_rank=4000000000000", "train.global_batch_size=100000000000000000000", "data.seq_len=1000000000000",
    f"train.steps={10**20}", "train={epochs: 1e308, global_batch_size: 8}", "data.mixing.epochs=1e308",
    "data.mixing.weights={sums: 1e308}", "train.steps=true", "train.steps=1:30",
    f"train.steps={'9' * 5000}", "train.steps=!!int abc", "report.tensorboard=!!bool 3", "run.name=!!timestamp x",
    f"report={'[' * 3000}", "report=&a [*a]", "data.sources.0.fields=&a {text: *a}", f"train.steps={'x' * 5000}",
    "report=[&a [x,x,x,x,x,x,x,x,x,x], " + ", ".join(
        f"&{'abcdefghi'[i + 1]} [{', '.join(['*' + 'abcdefghi'[i]] * 10)}]" for i in range(8)) + "]",
    f"data.sources.{'9' * 5000}.path=x", "data.sources.-1.path=x", "data.sources.1.path=x",
    *(f"data.sources=[{{type: reasoning_gym, task: a, generator: b, count: 3, options: {{x: {value}}}}}]"
      for value in ("!!binary /w==", ".nan", "2026-01-01", "!!set {1}")),
    "adapter.alpha\n=1", "train.steps=3\x85x", "\x1b[31mrun=3",
]  # fmt: skip


@pytest.mark.parametrize("word", FATAL_LATER, ids=lambda word: word[:40])
def test_what_was_accepted_and_fatal_later_or_a_traceback_is_refused(word, outcomes: Outcomes, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    assert load(path, [word], outcomes) is None


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key = draw(st.one_of(st.sampled_from(KEYS), mutated_texts(KEYS, [".", "..", "0", "-1", "9" * 5000, "\0", "²"])))
    odd = values(*YAML_SCALARS).map(lambda value: yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n"))
    return f"{key}={draw(st.one_of(st.sampled_from(FRAGMENTS), odd, st.text(max_size=10)))}"


@fuzz(0.12)
@given(words=st.lists(overrides(), min_size=1, max_size=2))
def test_overrides(words, outcomes: Outcomes, tmp_path_factory):
    path = folder_of(tmp_path_factory) / "recipe.yaml"
    path.write_text(MINIMAL)
    load(path, words, outcomes)


def folder_of(tmp_path_factory: Any) -> Path:
    """One folder for all examples of a test: hypothesis calls its body many times, pytest makes tmp_path once."""
    folder = tmp_path_factory.getbasetemp() / "fuzz-recipes"
    folder.mkdir(exist_ok=True)
    return folder


def load(path: Path, words: list[str], outcomes: Outcomes) -> Recipe | None:
    """Loads, and checks what is accepted: it can be used, and is written so that it is read again."""
    with writes_nothing(path.parent):
        recipe = outcomes.of(lambda: load_recipe(path, words))
    if recipe is not None:
        check_that_it_can_be_used(recipe)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
    return recipe


def check_nothing_else_is_read(path: tuple[str | int, ...], given_value: Any, recipe: Recipe) -> None:
    """A number stays that number, text stays that text, and a boolean is none of these."""
    try:
        read = at(recipe.model_dump(mode="json"), path)
    except (KeyError, TypeError, IndexError):
        raise AssertionError(f"{path} is lost") from None
    if isinstance(given_value, bool) or isinstance(read, bool):
        assert isinstance(read, bool) or path[-1] in free_options(path), (path, given_value, read)
    elif isinstance(given_value, int | float):
        assert read == given_value, (path, given_value, read)
    elif isinstance(given_value, str) and isinstance(read, str) and not given_value.startswith("~"):
        assert read in (given_value, str(Path(given_value))), (path, given_value, read)


def free_options(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Keys of a generator's own options, which the recipe does not know."""
    return path if "options" in path else ()


def check_that_it_can_be_used(recipe: Recipe) -> None:
    """What a run would do with the values, as far as it is cheap; a refusal for this machine is none of the recipe."""
    torch.manual_seed(recipe.run.seed)
    np.random.default_rng(recipe.run.seed)
    timedelta(seconds=recipe.run.start_timeout), timedelta(seconds=recipe.run.collective_timeout)
    paths = [recipe.run.directory, recipe.data.prepared_dir, recipe.deepspeed.config, Path(recipe.base.model)]
    paths += [Path(recipe.train.resume), *(source.path for source in recipe.data.sources if source.type == "files")]
    assert not [path for path in paths if "\0" in str(path)]
    train = recipe.train
    try:
        plan = plan_batches(train.global_batch_size, train.micro_batch_size, 2)
        steps = train.steps or steps_in(train.epochs or 0, 1000, train.global_batch_size)
        check_warm_up(train, steps)
    except UserError:
        return
    assert math.isfinite(float(steps)) and plan.gradient_accumulation_steps >= 1
    # What takes memory or time without end: rows of a step, and one adapter matrix.
    assert train.global_batch_size < 10**9 and recipe.adapter.total_rank < 10**9
    if train.global_batch_size < 10**5:
        assert len(rows_of_step(recipe.run.seed, 0, 1000, train.global_batch_size)) == train.global_batch_size
    os.fsencode(recipe.run.directory)
