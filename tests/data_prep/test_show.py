"""`show`: rows as readable text, with exactly the learned parts marked."""

import re
from collections import Counter

import pytest

from data_prep.prepare import prepare
from data_prep.show import show
from tests.data_prep.conftest import SUMS, WORDS, write_jsonl
from tests.data_prep.test_prepare import SYSTEM, TURNS
from trainer.cli import main

pytestmark = pytest.mark.usefixtures("without_pictures")

AWKWARD = [  # text that a terminal library could interpret
    {"instruction": "[bold]x[/bold] [/]", "output": "[red]y[/red] [/nothing]"},
    {"instruction": ":smile: \\n", "output": ":warning: 3:4"},
    {"instruction": "é 答 🙂\n\n  indented", "output": "an answer of " + "many words " * 30},
    {"instruction": "12 true 'a' http://x.y", "output": 'None 3.5 "b" /etc/x'},
]


def marked(question: str, answer: str) -> str:
    return SYSTEM + f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"


def marked_words(record: dict) -> str:
    text = ""
    for turn in record["messages"]:
        body = f"{turn['content']}<|im_end|>"
        text += f"<|im_start|>{turn['role']}\n" + (f"⟦{body}⟧" if turn["role"] == "assistant" else body) + "\n"
    return text


def shown_documents(output: str) -> list[tuple[str, str]]:
    """The line above each document, and its text as it is shown."""
    _, *parts = re.split(r"^(\[\w+\] \d+ of \d+ tokens learned)\n", output, flags=re.MULTILINE)
    texts = (re.sub(r"\nrow \d+: \d+ tokens\n$", "\n", text) for text in parts[1::2])
    return [(head, text.removesuffix("\n")) for head, text in zip(parts[::2], texts, strict=True)]


@pytest.mark.parametrize("records", [SUMS, AWKWARD], ids=["plain", "awkward"])
def test_learned_tokens_are_in_brackets_if_there_is_no_terminal(config_of, tokenizer, capsys, records):
    config = config_of({"sums": records, "words": WORDS}, seq_len=2048, held_out=1e-9)
    prepare(config, tokenizer)
    capsys.readouterr()
    show(config.prepared_dir, tokenizer, 100)
    documents = shown_documents(capsys.readouterr().out)
    expected = [marked(record["instruction"], record["output"]) for record in records] + [*map(marked_words, WORDS)]
    assert Counter(text for _, text in documents) == Counter(expected)
    for head, text in documents:
        learned = [len(tokenizer(part)["input_ids"]) for part in re.findall("⟦(.*?)⟧", text, re.DOTALL)]
        every = len(tokenizer(text.replace("⟦", "").replace("⟧", ""))["input_ids"])
        task = "words" if text.startswith("<|im_start|>system\nSort.") else "sums"
        assert head == f"[{task}] {sum(learned)} of {every} tokens learned"


def test_learned_tokens_are_colored_on_a_terminal(config_of, tokenizer, capsys, monkeypatch):
    config = config_of({"sums": SUMS}, seq_len=2048, held_out=1e-9)
    prepare(config, tokenizer)
    capsys.readouterr()
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(config.prepared_dir, tokenizer, 100)
    output = capsys.readouterr().out
    assert "⟦" not in output
    coloured = re.findall("\x1b\\[30;42m(.*?)\x1b\\[0m", output, re.DOTALL)
    assert sorted(coloured) == sorted(f"{record['output']}<|im_end|>" for record in SUMS)
    plain = re.sub("\x1b\\[[0-9;]*m", "", output)
    assert all(SYSTEM + TURNS.format(record["instruction"], record["output"]) in plain for record in SUMS)


def test_at_most_the_requested_rows_are_shown(config_of, tokenizer, capsys):
    config = config_of(seq_len=64, held_out=1e-9)
    rows = prepare(config, tokenizer).manifest["splits"]["train"]["rows"]
    assert rows > 3
    for count in (1, 3, rows + 5):
        capsys.readouterr()
        show(config.prepared_dir, tokenizer, count)
        heads = re.findall(r"^row (\d+): (\d+) tokens$", capsys.readouterr().out, re.MULTILINE)
        assert [int(index) for index, _ in heads] == list(range(min(count, rows)))
        assert all(0 < int(tokens) <= 64 for _, tokens in heads)


def test_what_is_cut_from_an_answer_is_shown_as_far_as_it_is_learned(config_of, tokenizer, capsys):
    records = [{"instruction": "b a", "output": "4 " * 100}]
    config = config_of({"sums": records}, seq_len=64, held_out=1e-9, system_prompt="Sort.", over_long="cut_right")
    prepare(config, tokenizer)
    capsys.readouterr()
    show(config.prepared_dir, tokenizer, 1)
    ((head, text),) = shown_documents(capsys.readouterr().out)
    before = "<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\nb a<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(before + "⟦4 4 ") and text.endswith("⟧") and text.count("⟧") == 1
    assert head == f"[sums] {64 - len(tokenizer(before)['input_ids'])} of 64 tokens learned"


RECIPE = """
run: {{name: first}}
base: {{model: {folder}/base}}
data:
  prepared_dir: {folder}/prepared
  seq_len: 256
  held_out: 2
  sources: [{{type: files, task: sums, path: {folder}/sums.jsonl}}]
train: {{steps: 10, global_batch_size: 8}}
deepspeed: {{config: ds_configs/zero3.json}}
"""


def test_the_command_prepares_and_shows_and_then_shows_what_is_kept(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    write_jsonl(tmp_path / "sums.jsonl", SUMS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    outputs = []
    for command in (["--show", "100"], ["data.held_out=2", "--show", "1"], []):
        assert main(["prepare", str(recipe), *command]) == 0
        outputs.append(capsys.readouterr().out)
    assert "prepared was prepared in" in outputs[0]
    assert all("prepared is unchanged and was kept" in output for output in outputs[1:])
    texts = [text for _, text in shown_documents(outputs[0])]
    assert len(texts) == len(SUMS) - 2
    assert set(texts) < {marked(record["instruction"], record["output"]) for record in SUMS}
    assert [text for _, text in shown_documents(outputs[1])] == texts[: len(shown_documents(outputs[1]))]
    assert shown_documents(outputs[1]) and not shown_documents(outputs[2])


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_an_invalid_count_is_refused(tmp_path, capsys, count):
    with pytest.raises(SystemExit) as ended:
        main(["prepare", str(tmp_path / "recipe.yaml"), "--show", count])
    assert ended.value.code == 2
    assert f"'{count}': expected a whole number of at least 1" in capsys.readouterr().err


def test_a_split_document_is_shown_piece_by_piece(config_of, tokenizer, capsys):
    records = [{"instruction": "b a", "output": "4 " * 100}]
    config = config_of({"sums": records}, seq_len=64, held_out=1e-9, over_long="split")
    prepare(config, tokenizer)
    capsys.readouterr()
    show(config.prepared_dir, tokenizer, 100)
    texts = [text for _, text in shown_documents(capsys.readouterr().out)]
    assert len(texts) > 2
    assert sum(text.count("⟦") for text in texts) == len(texts)
    later = [text for text in texts if not text.startswith("<|im_start|>")]
    assert all(not text.startswith("⟦") for text in later)  # no piece's first token is learned
    assert sum(text.count("4") for text in texts) == 100
