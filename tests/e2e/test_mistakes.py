"""A person's mistakes: one line that names key, value, expectation and remedy; exit status 2; nothing half-written."""

import json

import pytest

from tests.support.tiny_models import tiny_llama
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer
from trainer.cli import main

pytestmark = pytest.mark.slow

# what is given on the command line, and what the line must say
TRAIN = {
    "misspelt key": (["train.stepz=3"], "unknown key train.stepz; did you mean train.steps"),
    "wrong type": (["train.steps=many"], "train.steps='many'"),
    "zero steps": (["train.steps=0"], "train.steps=0"),
    "no length": (["train.steps=null"], "steps=None and epochs=None: expected exactly one"),
    "rank that does not divide": (["adapter.total_rank=7"], "nearest is 8"),
    "batch that does not divide": (["train.micro_batch_size=3"], "the nearest that is: 3"),
    "no such target": (["adapter.target_modules=[nope]"], "'nope' matches no linear layer of llama; it has down_proj"),
    "no such base": (["base.model=./nowhere"], "folder ./nowhere does not exist"),
    "no prepared set": (["data.prepared_dir=elsewhere"], "no prepared set in elsewhere; run `teamlora prepare RECIPE`"),
    "other data section": (["data.seq_len=64"], "data.seq_len: the recipe says 64, but prepared was prepared with 96"),
    "no DeepSpeed file": (["deepspeed.config=none.json"], "deepspeed.config=none.json: No such file"),
    "contradicting DeepSpeed file": (["deepspeed.config=own.json"], "gradient_clipping=9.0 contradicts train.max_grad"),
    "activations of a GPU on a CPU": (
        ["train.activation_checkpointing=offload"],
        "train.activation_checkpointing=offload: needs a GPU, and this machine has none; use true, or try",
    ),
    "GPU optimizer on a CPU": (["train.optimizer=adamw_8bit"], "train.optimizer=adamw_8bit: needs a GPU"),
    "no adapter to start from": (["adapter.init_from=base"], "adapter.init_from: base holds no adapter"),
    "warm-up that never ends": (
        ["train.warmup_steps=400", "train.warmup_ratio=null"],
        "so it would end before the learning rate is reached",
    ),
    "beta of 1": (["train.betas=[0.9, 1.0]"], "train.betas"),
    "attention that is missing": (
        ["base.attention=flash_attention_2", "base.dtype=bf16"],
        "base.attention=flash_attention_2: needs a GPU, and this machine has none; use sdpa",
    ),
    "more nodes than there are": (["run.nodes=2"], "run.nodes=2, and the ranks are on 1: "),
    "argument without a value": (["train.steps"], "expected key.path=value"),
}


def mistake(arguments: list[str], capsys) -> str:
    """The one line that the command says before it ends with status 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    deepspeed = {"gradient_clipping": 9.0, "zero_optimization": {"stage": 0}}
    (workplace.folder / "own.json").write_text(json.dumps(deepspeed))
    arguments, expected = TRAIN[case]
    assert expected in mistake(["train", "recipe.yaml", "run.name=refused", *arguments], capsys)
    assert not (workplace.folder / "runs" / "refused").exists()


def test_train_refuses_a_missing_recipe(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    assert "recipe none.yaml: No such file" in mistake(["train", "none.yaml"], capsys)


def test_train_refuses_the_directory_of_another_recipe(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    run = workplace.folder / "runs" / "taken"
    assert workplace.teamlora("train", "recipe.yaml", "run.name=taken", "train.steps=1").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = mistake(["train", "recipe.yaml", "run.name=taken", "train.steps=2"], capsys)
    assert "holds a run of another recipe: train.steps was 1 and is 2; undo that or give another run.name" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_train_refuses_an_unfinished_run_that_it_must_not_go_on_with(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    assert workplace.teamlora("train", "recipe.yaml", "run.name=broken", "train.steps=1").returncode == 0
    (workplace.folder / "runs" / "broken" / "adapter").rename(workplace.folder / "runs" / "broken" / "lost")
    said = mistake(["train", "recipe.yaml", "run.name=broken", "train.steps=1", "train.resume=never"], capsys)
    assert "unfinished run of this recipe" in said
    assert "run.name=broken-2" in said


def test_train_refuses_a_set_prepared_with_another_tokenizer(workplace, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(workplace.folder)
    tiny_llama(tmp_path / "base")
    tiny_tokenizer(chat_template=CHATML_TEMPLATE + " ").save_pretrained(tmp_path / "base")
    capsys.readouterr()
    said = mistake(["train", "recipe.yaml", f"base.model={tmp_path / 'base'}", "run.name=refused"], capsys)
    assert "was prepared with another chat template" in said


PREPARE = {
    "no JSON": ('{"instruction": "a", "output": "b"}\n{oops\n', "broken.jsonl:2: not JSON"),
    "missing field": ('{"instruction": "a"}\n', "broken.jsonl:1: lacks field `output`"),
    "empty task": ("", "task 'broken' is empty"),
    "no labels left": ('{"instruction": "' + "word " * 400 + '", "output": "b"}\n' * 1, "raise data.seq_len"),
}


@pytest.mark.parametrize("case", PREPARE)
def test_prepare_refuses(case, workplace, edited, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    content, expected = PREPARE[case]
    (workplace.folder / "broken.jsonl").write_text(content)
    sources = [{"type": "files", "task": "broken", "path": "broken.jsonl"}]
    recipe = edited(data__sources=sources, data__prepared_dir="refused")
    assert expected in mistake(["prepare", recipe], capsys)
    assert not (workplace.folder / "refused").exists()


@pytest.mark.parametrize("command", [["generate", "nothing", "--prompt", "x"], ["evaluate", "nothing"]])
def test_commands_on_a_run_refuse_a_folder_without_one(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    assert "nothing: no run here" in mistake(command, capsys)
