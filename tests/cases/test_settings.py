"""Settings as people have them: recipes, DeepSpeed files of the HF trainer, short runs."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.user_error import UserError
from tests.support.minimal_recipe import MINIMAL
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.estimate.zero_settings import zero_settings
from trainer.objective.batches import plan_batches
from trainer.objective.optimizer import build_scheduler, check_warm_up
from trainer.recipe import Recipe, TrainConfig
from trainer.recipe_file import load_recipe
from trainer.training.run_plan import check_held_out

CASES = Path(__file__).parent
HF = CASES / "40-hf-style-deepspeed-file"


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_key_twice_in_a_recipe_is_refused_with_both_lines():
    path = CASES / "15-a-key-twice-in-a-recipe" / "recipe.yaml"
    message = f"recipe {path}: key train.learning_rate is given twice, on lines 7 and 9; remove one"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_recipe(path)


@pytest.mark.parametrize(("dtype", "bf16"), [("bf16", True), ("fp32", False)])
def test_auto_in_a_deepspeed_file_of_the_hf_trainer_is_filled_from_the_recipe(tmp_path, dtype, bf16):
    given = recipe(tmp_path, f"deepspeed.config={HF / 'hf.json'}", f"base.dtype={dtype}", "train.max_grad_norm=0.5")
    assert read_deepspeed_config(given, plan_batches(8, 2, 2)) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3},
        "timers": {"throughput": {"enabled": False}},
    }


@pytest.mark.parametrize(
    ("given", "enabled"), [({}, False), ({"synchronized": False}, False), ({"enabled": True}, True)]
)
def test_deepspeeds_timer_which_waits_for_the_gpu_is_off_unless_the_file_asks_for_it(tmp_path, given, enabled):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "timers": {"throughput": given}}))
    config = read_deepspeed_config(recipe(tmp_path, f"deepspeed.config={path}"), plan_batches(8, 1, 2))
    assert config["timers"]["throughput"] == {**given, "enabled": enabled}


def test_a_zero_stage_in_quotes_is_that_stage_for_every_part(tmp_path):
    config = read_deepspeed_config(recipe(tmp_path, f"deepspeed.config={HF / 'stage.json'}"), plan_batches(8, 1, 2))
    assert config["zero_optimization"]["stage"] == 3
    assert zero_settings(config, 2).stage == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train_batch_size: 16", "train_batch_size=16 contradicts train.global_batch_size=8"),
        ("bf16: {enabled: false}", "bf16.enabled=false contradicts base.dtype=bf16"),
        (
            "zero_allow_untested_optimizer: false",
            "zero_allow_untested_optimizer=false contradicts train.optimizer=adamw",
        ),
        ("zero_force_ds_cpu_optimizer: true", "zero_force_ds_cpu_optimizer=true contradicts train.optimizer=adamw"),
    ],
)
def test_what_contradicts_the_recipe_is_refused_with_both_and_the_remedy(tmp_path, given, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **yaml.safe_load(given)}))
    with pytest.raises(UserError, match=f'^{re.escape(f"{path}: {message}")} of the recipe; write "auto" in the file$'):
        read_deepspeed_config(recipe(tmp_path, f"deepspeed.config={path}", "base.dtype=bf16"), plan_batches(8, 1, 2))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.eval_every=5"], "train.eval_every=5"),
        (["train.eval_every=5", "train.early_stopping_patience=2"], "train.eval_every=5"),
        (["train.eval_every=5", "checkpoint.load_best_at_end=true"], "train.eval_every=5"),
    ],
)
def test_held_out_losses_without_held_out_rows_are_refused_by_the_key_that_asks(tmp_path, overrides, key):
    given = recipe(tmp_path, *overrides)
    with pytest.raises(UserError, match=rf"^{key} needs held-out losses, but .* has no held-out rows; prepare with a"):
        check_held_out(given, 0)
    check_held_out(given, 1)


def test_training_on_everything_needs_no_held_out_rows(tmp_path):
    check_held_out(recipe(tmp_path), 0)


def test_a_misspelled_key_of_a_deepspeed_file_is_refused_with_the_nearest(tmp_path):
    path = HF / "typo.json"
    message = (
        f"{path}: unknown key zero_optimization.stage3_max_live_paramters; did you mean "
        "zero_optimization.stage3_max_live_parameters?"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read_deepspeed_config(recipe(tmp_path, f"deepspeed.config={path}"), plan_batches(8, 1, 2))


def train_config(**changes) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 1, "global_batch_size": 8, **changes})


def test_a_warm_up_ratio_that_covers_the_run_is_refused():
    message = (
        "train.warmup_ratio=0.6: the run has 1 steps, so it would end before the learning rate is reached; lower it"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_warm_up(train_config(warmup_ratio=0.6), 1)
    check_warm_up(train_config(warmup_ratio=0.4), 1)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_starts_with_its_share_of_the_rate_not_with_0(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    scheduler = build_scheduler(train_config(warmup_steps=4, lr_scheduler=kind), optimizer, 10)
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0]
