"""Preparing a whole set: its rows, items and manifest."""

import numpy as np
import pytest

from data_prep.config import DataConfig
from data_prep.encode import Encoder
from data_prep.items import answer_of
from data_prep.prepare import prepare
from data_prep.reader import open_prepared
from data_prep.split import Split
from data_prep.user_error import UserError
from tests.data_prep.conftest import SUMS, WORDS
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TURNS = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"

# Text of every document: its task, and its text that is scored.
EXPECTED = {
    SYSTEM + TURNS.format(f"What is {i} + {i}?", 2 * i): ("sums", f"{2 * i}<|im_end|>") for i in range(len(SUMS))
} | {
    "<|im_start|>system\nSort.<|im_end|>\n" + TURNS.format(f"b{i} a", f"a b{i}") + TURNS.format("Last?", f"b{i}"): (
        "words",
        f"a b{i}<|im_end|>b{i}<|im_end|>",
    )
    for i in range(len(WORDS))
}


def documents_in(rows) -> list[dict[str, np.ndarray]]:
    """The rows, cut where positions restart."""
    documents = []
    for row in rows:
        starts = np.flatnonzero(row["position_ids"] == 0)[1:]
        parts = {name: np.split(column, starts) for name, column in row.items()}
        documents += [dict(zip(parts, columns, strict=True)) for columns in zip(*parts.values(), strict=True)]
    return documents


def test_rows_hold_every_document_once_with_its_positions_task_and_labels(config_of, tokenizer):
    config = config_of()
    prepare(config, tokenizer)
    prepared = open_prepared(config, tokenizer)
    assert prepared.tasks == ["sums", "words"]
    assert max(len(row["input_ids"]) for row in prepared.train) <= 128
    documents = documents_in(prepared.train) + documents_in(prepared.held_out)
    assert len(documents) == len(EXPECTED)
    found = {}
    for document in documents:
        ids, labels = document["input_ids"], document["labels"]
        scored = labels != -100
        (task,) = set(document["task_ids"].tolist())
        assert document["position_ids"].tolist() == list(range(len(ids)))
        assert (labels[scored] == ids[scored]).all()
        found[tokenizer.decode(ids)] = (prepared.tasks[task], tokenizer.decode(ids[scored]))
    assert found == EXPECTED


def test_manifest_counts_what_the_rows_hold(config_of, tokenizer):
    config = config_of()
    manifest = prepare(config, tokenizer).manifest
    prepared = open_prepared(config, tokenizer)
    for split, rows in (("train", prepared.train), ("held_out", prepared.held_out)):
        counts, documents = manifest["splits"][split], documents_in(rows)
        tokens = sum(len(row["input_ids"]) for row in rows)
        assert (counts["rows"], counts["tokens"]) == (len(rows), tokens)
        assert counts["fill_rate"] == pytest.approx(tokens / (len(rows) * 128), abs=1e-4)
        for index, task in enumerate(prepared.tasks):
            own = [document for document in documents if document["task_ids"][0] == index]
            assert sum(counts["tasks"][task].pop("lengths")) == len(own)
            assert counts["tasks"][task] == {
                "documents": {"train": {"sums": 10, "words": 6}, "held_out": {"sums": 2, "words": 2}}[split][task],
                "truncated": 0,
                "rows": sum(index in row["task_ids"] for row in rows),
                "tokens": sum(len(document["input_ids"]) for document in own),
                "labelled_tokens": sum(int((document["labels"] >= 0).sum()) for document in own),
            }
        assert sum(counts["row_tokens"]) == len(rows)
    assert manifest["removed"] == {"sums": {}, "words": {}}


def test_held_out_documents_become_items_with_the_turns_before_the_last_answer(config_of, tokenizer):
    texts = [{"instruction": f"Line\u2028{i}", "output": f"\u0085 {i}"} for i in range(4)]
    config = config_of({"sums": texts, "words": WORDS}, system_prompt="Be brief.")
    prepare(config, tokenizer)
    items = open_prepared(config, tokenizer).items
    own = [item for item in items if item["task"] == "sums"]
    numbers = [item["answer"].removeprefix("\u0085 ") for item in own]
    system = {"role": "system", "content": "Be brief."}
    assert len(own) == 2 and len(items) == 4
    assert [item["messages"] for item in own] == [
        [system, {"role": "user", "content": f"Line\u2028{number}"}] for number in numbers
    ]
    for item in items[2:]:
        assert {"messages": [*item["messages"], {"role": "assistant", "content": item["answer"]}]} in WORDS


def test_items_keep_reasoning_that_is_in_a_separate_field(config_of):
    template = CHATML_TEMPLATE.replace("+ message['content']", "+ message.get('thinking', '') + message['content']")
    tokenizer = tiny_tokenizer(template)
    answers = [{"role": "assistant", "content": f"{i}", "reasoning_content": f"half of {2 * i}"} for i in range(8)]
    records = [{"messages": [{"role": "user", "content": f"{2 * i} / 2?"}, a]} for i, a in enumerate(answers)]
    config = config_of({"halves": records})
    prepare(config, tokenizer)
    found = open_prepared(config, tokenizer).items
    assert len(found) == 2
    assert all(answer_of(item) in answers and answer_of(item)["content"] == item["answer"] for item in found)


def test_items_have_the_records_choices_and_the_recipes_metric(config_of, tokenizer):
    chosen = [{"instruction": f"{i}?", "output": str(i), "choices": ["x", str(i)]} for i in range(4)]
    config = config_of({"chosen": chosen, "words": WORDS})
    prepare(config, tokenizer)
    own, others = (open_prepared(config, tokenizer).items[part] for part in (slice(0, 2), slice(2, 4)))
    assert [item["choices"] for item in own] == [["x", item["answer"]] for item in own]
    assert not any({"choices", "metric"} & {*item} for item in others) and "metric" not in own[0]

    sources = [source.model_copy(update={"metric": "rouge_l"}) for source in config.sources]
    scored = config.model_copy(update={"sources": sources})
    prepare(scored, tokenizer)
    assert {item["metric"] for item in open_prepared(scored, tokenizer).items} == {"rouge_l"}


def test_a_document_without_the_choices_that_the_metric_needs_is_refused_with_its_place(config_of, tokenizer):
    config = config_of({"sums": SUMS})
    source = config.sources[0].model_copy(update={"metric": "choices"})
    with pytest.raises(
        UserError, match=r"sums\.jsonl:\d+: metric `choices` of task 'sums' needs a field `choices`, a li"
    ):
        prepare(config.model_copy(update={"sources": [source]}), tokenizer)


def test_a_document_without_those_choices_can_be_dropped_as_a_bad_row(config_of, tokenizer):
    chosen = [{**record, "choices": ["x", record["output"]]} for record in SUMS]
    without = {"instruction": "word " * 99, "output": "4"}
    config = config_of({"sums": [*chosen, without]}, seq_len=64, over_long="split", cleaning={"bad_rows": "drop"})
    source = config.sources[0].model_copy(update={"metric": "choices"})
    manifest = prepare(config.model_copy(update={"sources": [source]}), tokenizer).manifest
    (reason, found), *others = manifest["removed"]["sums"].items()
    assert (reason, found["documents"], others) == ("bad_row", 1, [])
    assert "sums.jsonl:13: metric `choices` of task 'sums' needs a field `choices`" in found["first"][0]


def test_sources_of_a_task_with_two_metrics_are_refused():
    sources = [{"type": "files", "task": "dates", "path": "a.json", "metric": metric} for metric in ("token_f1", None)]
    with pytest.raises(
        ValueError, match="sources of task 'dates' have the metrics token_f1 and None; give all of them"
    ):
        DataConfig(prepared_dir="prepared", seq_len=64, sources=sources)


def test_what_cannot_be_learned_from_is_dropped_and_counted_by_reason(config_of, tokenizer):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "4"}
    no_answer, empty_answer = [user], [user, {"role": "assistant", "content": " \n"}]
    long_question, long_answer = [{**user, "content": "Hi " * 90}, answer], [user, {**answer, "content": "4 " * 90}]
    turns = [no_answer, empty_answer, long_question, long_question, long_answer]
    config = config_of({"sums": SUMS, "words": [{"messages": t} for t in turns]}, seq_len=64, held_out=1e-9)
    manifest = prepare(config, tokenizer).manifest
    removed = manifest["removed"]["words"]
    counts = {reason: found["documents"] for reason, found in removed.items()}
    assert manifest["removed"]["sums"] == {}
    assert counts == {"empty_answer": 1, "no_assistant_turn": 1, "no_labels_after_cut": 2}
    assert [place.rpartition(":")[2] for place in removed["no_labels_after_cut"]["first"]] == ["3", "4"]
    counts = manifest["splits"]["train"]["tasks"]["words"]
    assert (counts["documents"], counts["truncated"], counts["tokens"]) == (1, 1, 64)
    assert all((document["labels"] != -100).any() for document in documents_in(open_prepared(config, tokenizer).train))


def test_a_set_without_held_out_documents_is_noted_and_opens(config_of, tokenizer):
    config = config_of(held_out=1e-9)
    report = prepare(config, tokenizer)
    prepared = open_prepared(config, tokenizer)
    assert (len(prepared.held_out), prepared.items) == (0, [])
    assert "note: task 'words' has no held-out documents" in str(report)


@pytest.mark.parametrize("none", [0, 0.0])
@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_a_set_that_holds_nothing_out_trains_on_all_says_so_once_and_opens(config_of, tokenizer, none, duplicates):
    config = config_of(held_out=none, cleaning={"duplicates": duplicates})
    report = prepare(config, tokenizer)
    prepared = open_prepared(config, tokenizer)
    assert sorted(tokenizer.decode(found["input_ids"]) for found in documents_in(prepared.train)) == sorted(EXPECTED)
    assert (len(prepared.held_out), prepared.items, list(prepared.held_out)) == (0, [], [])
    assert report.manifest["notes"] == [
        "nothing is held out (data.held_out: 0): runs report no held-out losses, and `teamlora evaluate` has no items"
    ]


def lose_a_training_document(monkeypatch) -> None:
    from data_prep.split import split_documents

    def lossy(documents, config):
        split = split_documents(documents, config)
        return Split(split.train[1:], split.held_out, split.removed)

    monkeypatch.setattr("data_prep.prepare.split_documents", lossy)


def lose_a_row_in_encoding(monkeypatch) -> None:
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, documents: encode(self, documents[1:]))


@pytest.mark.parametrize("lose", [lose_a_training_document, lose_a_row_in_encoding])
def test_a_document_that_is_neither_learned_nor_held_out_nor_removed_is_an_error(
    config_of, tokenizer, monkeypatch, lose
):
    lose(monkeypatch)
    config = config_of({"sums": SUMS})
    with pytest.raises(
        RuntimeError, match=r"^12 documents and pieces were read, but 9 are for training, 2 held out and"
    ):
        prepare(config, tokenizer)
    assert not config.prepared_dir.exists()


@pytest.mark.parametrize("over_long", ["cut_right", "cut_left", "split", "drop"])
def test_every_document_read_is_learned_held_out_or_counted_as_removed_however_it_is_cut(
    config_of, tokenizer, over_long
):
    long = [{"instruction": "Count " * 90, "output": f"{i} " * 90} for i in range(4)]
    bad = [{"instruction": "Why?"}, {"instruction": "Why?", "output": ""}]
    records = [*SUMS, *SUMS[:3], *long, *long[:1], *bad]
    keys = {"cleaning": {"bad_rows": "drop"}, "mixing": {"caps": {"sums": 2}}}
    config = config_of({"sums": records}, seq_len=64, over_long=over_long, **keys)
    manifest = prepare(config, tokenizer).manifest
    assert manifest["splits"]["train"]["tasks"]["sums"]["documents"] == 2
    held_out, removed = manifest["splits"]["held_out"]["tasks"]["sums"], manifest["removed"]["sums"].values()
    counted = manifest["different_documents"]["sums"] + held_out["documents"] + sum(r["documents"] for r in removed)
    assert counted == len(records) if over_long != "split" else counted > len(records)


def test_rows_do_not_depend_on_the_order_of_sources(config_of, tokenizer, tmp_path):
    forwards = config_of({"sums": SUMS, "words": WORDS})
    backwards = config_of({"words": WORDS, "sums": SUMS}, prepared_dir=tmp_path / "backwards")
    rows = []
    for config in (forwards, backwards):
        prepare(config, tokenizer)
        rows.append([row["input_ids"].tolist() for row in open_prepared(config, tokenizer).train])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_an_answer_to_nothing_is_learned_and_makes_no_item(config_of, tokenizer, system_prompt):
    alone = [{"messages": [{"role": "assistant", "content": f"hello {i}"}]} for i in range(6)]
    config = config_of({"sums": SUMS, "words": alone}, system_prompt=system_prompt)
    assert prepare(config, tokenizer).manifest["splits"]["train"]["tasks"]["words"]["documents"] == 4
    assert {item["task"] for item in open_prepared(config, tokenizer).items} == {"sums"}
