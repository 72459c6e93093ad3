"""Documents that are too long, and those without labels: what is removed, and which places are named."""

import re
from collections import Counter

import numpy as np
import pytest

from data_prep.documents import Document
from data_prep.encode import Encoded, Encoder, Removed
from data_prep.prepare import prepare
from data_prep.reader import open_prepared
from data_prep.user_error import UserError

pytestmark = pytest.mark.usefixtures("without_pictures")

NEVER = 1e-9  # a fraction so small that nothing is held out
CHAT = "<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\nb a<|im_end|>\n<|im_start|>assistant\n⟦{}<|im_end|>⟧\n"


def asked(question: str, answer: str = "4") -> dict[str, str]:
    return {"instruction": question, "output": answer}


def removed(manifest: dict, task: str) -> dict[str, int]:
    return {reason: found["documents"] for reason, found in manifest["removed"][task].items()}


def lines_of(manifest: dict, task: str, reason: str) -> list[int]:
    return [int(place.rpartition(":")[2]) for place in manifest["removed"][task][reason]["first"]]


# Documents that are too long


def tokens_of(tokenizer, marked: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text, and which of them are between ⟦ and ⟧."""
    ids, scored = [], []
    for i, piece in enumerate(re.split("[⟦⟧]", marked)):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        scored += [i % 2 == 1] * len(tokens)
    return np.array(ids), np.array(scored)


def encode(config_of, tokenizer, documents: list[Document], **keys: object) -> list[Encoded | Removed]:
    return Encoder(tokenizer, config_of(**keys)).encode(documents)


def conversation(*turns: tuple[str, str], origin: str = "file:1", **keys: object) -> Document:
    return Document("sums", [{"role": role, "content": text} for role, text in turns], origin, "chat", **keys)


def long_answer(words: int) -> tuple[Document, str]:
    """A conversation, and its text with what is learned marked."""
    answer = " ".join(f"{i}a" for i in range(words))
    return conversation(("system", "Sort."), ("user", "b a"), ("assistant", answer)), CHAT.format(answer)


SEQ_LEN = 40


@pytest.mark.parametrize("rule", ["cut_right", "cut_left", "split", "drop"])
def test_a_document_that_just_fits_is_left_whole_by_every_rule(config_of, tokenizer, rule):
    document, marked = long_answer(4)
    ids, scored = tokens_of(tokenizer, marked)
    (whole,) = encode(config_of, tokenizer, [document], seq_len=len(ids), over_long=rule)
    assert (whole.input_ids.tolist(), whole.scored.tolist()) == (ids.tolist(), scored.tolist())
    assert (whole.piece, whole.cut) == (0, False)


@pytest.mark.parametrize(("rule", "kept_tokens"), [("cut_right", slice(SEQ_LEN)), ("cut_left", slice(-SEQ_LEN, None))])
def test_a_cut_keeps_the_tokens_of_one_end(config_of, tokenizer, rule, kept_tokens):
    document, marked = long_answer(30)
    ids, scored = (array[kept_tokens] for array in tokens_of(tokenizer, marked))
    scored[0] = False  # there is no token to predict it from
    (cut,) = encode(config_of, tokenizer, [document], seq_len=SEQ_LEN, over_long=rule)
    assert (cut.input_ids.tolist(), cut.scored.tolist()) == (ids.tolist(), scored.tolist())
    assert (len(cut), cut.piece, cut.cut) == (SEQ_LEN, 0, True)


@pytest.mark.parametrize("words", [12, 30, 57])
def test_a_split_document_is_all_its_tokens_in_order_and_no_piece_scores_its_first(config_of, tokenizer, words):
    document, marked = long_answer(words)
    ids, scored = tokens_of(tokenizer, marked)
    pieces = encode(config_of, tokenizer, [document], seq_len=SEQ_LEN, over_long="split")
    expected = [slice(start, start + SEQ_LEN) for start in range(0, len(ids), SEQ_LEN)]
    assert len(pieces) == len(expected)
    for number, (piece, part) in enumerate(zip(pieces, expected, strict=True)):
        learned = [i > 0 and bool(flag) for i, flag in enumerate(scored[part])]
        if not any(learned):
            assert piece == Removed(document.origin, "no_labels_after_cut")
            continue
        assert (piece.input_ids.tolist(), piece.scored.tolist()) == (ids[part].tolist(), learned)
        assert (piece.piece, piece.cut, piece.document) == (number, True, document)


SYSTEM_TURN = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def test_pieces_without_labels_are_counted_and_a_held_out_document_is_one_item(config_of, tokenizer):
    question, answers = "b " * 100, ["a " * (50 + 3 * i) for i in range(10)]
    config = config_of(
        {"sums": [asked(question, answer) for answer in answers]}, seq_len=64, over_long="split", held_out=4
    )
    manifest = prepare(config, tokenizer).manifest
    pieces, without = Counter(), 0  # of each answer
    for answer in answers:
        marked = f"{SYSTEM_TURN}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"
        _, scored = tokens_of(tokenizer, marked)
        learned = [scored[start + 1 : start + 64].any() for start in range(0, len(scored), 64)]
        pieces[answer] = learned.count(True)
        without += learned.count(False)
    assert without >= 20 and min(pieces.values()) >= 2
    assert removed(manifest, "sums") == {"no_labels_after_cut": without}
    items = [item["answer"] for item in open_prepared(config, tokenizer).items]
    assert len(items) == len(set(items)) == 4
    for split, own in (("held_out", items), ("train", set(answers) - set(items))):
        counts = manifest["splits"][split]["tasks"]["sums"]
        assert counts["documents"] == counts["truncated"] == sum(pieces[answer] for answer in own)


def test_drop_takes_out_the_whole_document(config_of, tokenizer):
    document, _ = long_answer(30)
    short, _ = long_answer(2)
    results = encode(config_of, tokenizer, [document, short], seq_len=SEQ_LEN, over_long="drop")
    assert results[0] == Removed(document.origin, "over_long")
    assert results[1].document is short and not results[1].cut


@pytest.mark.parametrize("rule", ["cut_right", "split"])
def test_a_cut_that_leaves_no_label_removes_the_document_or_the_piece(config_of, tokenizer, rule):
    document = conversation(("user", "b " * 100), ("assistant", "4"))
    results = encode(config_of, tokenizer, [document], seq_len=SEQ_LEN, over_long=rule)
    assert results[0] == Removed(document.origin, "no_labels_after_cut")
    lost = [isinstance(result, Removed) for result in results]
    assert lost == ([True] if rule == "cut_right" else [True] * (len(results) - 1) + [False])


# Documents with and without something to learn


@pytest.mark.parametrize("mask_history", [False, True])
def test_mask_history_leaves_the_last_answer_only(config_of, tokenizer, mask_history):
    document = conversation(
        ("system", "Sort."), ("user", "b a"), ("assistant", "a b"), ("user", "d c"), ("assistant", "c d"), ("user", "e")
    )
    first = "a b<|im_end|>" if mask_history else "⟦a b<|im_end|>⟧"
    marked = (
        f"<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\nb a<|im_end|>\n<|im_start|>assistant\n{first}\n"
        "<|im_start|>user\nd c<|im_end|>\n<|im_start|>assistant\n⟦c d<|im_end|>⟧\n<|im_start|>user\ne<|im_end|>\n"
    )
    ids, scored = tokens_of(tokenizer, marked)
    (encoded,) = encode(config_of, tokenizer, [document], mask_history=mask_history)
    assert (encoded.input_ids.tolist(), encoded.scored.tolist()) == (ids.tolist(), scored.tolist())


@pytest.mark.parametrize(
    ("turns", "mask_history", "reason"),
    [
        ([("user", "a")], False, "no_assistant_turn"),
        ([("user", "a"), ("assistant", "")], False, "empty_answer"),
        ([("user", "a"), ("assistant", " \n\t")], False, "empty_answer"),
        ([("user", "a"), ("assistant", ""), ("user", "a"), ("assistant", "b")], False, "empty_answer"),
        ([("user", "a"), ("assistant", ""), ("user", "a"), ("assistant", "b")], True, None),
        ([("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", " ")], True, "empty_answer"),
    ],
)
def test_a_conversation_without_an_answer_is_removed(config_of, tokenizer, turns, mask_history, reason):
    (result,) = encode(config_of, tokenizer, [conversation(*turns)], mask_history=mask_history)
    assert getattr(result, "reason", None) == reason


def test_an_answer_that_is_given_is_not_learned(config_of, tokenizer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    (result,) = encode(config_of, tokenizer, [conversation(*turns, given=frozenset({1}))])
    assert tokenizer.decode(result.input_ids[result.scored]) == "d<|im_end|>"
    (result,) = encode(config_of, tokenizer, [conversation(*turns, given=frozenset({1, 3}))])
    assert result.reason == "no_assistant_turn"


def test_blank_texts_are_removed_and_results_stay_in_order(config_of, tokenizer):
    texts = ["a b", " \n", "c", "", "d e"]
    documents = [Document("sums", [], f"file:{i}", "text", text=text) for i, text in enumerate(texts)]
    results = encode(config_of, tokenizer, documents)
    origins = [result.place if isinstance(result, Removed) else result.document.origin for result in results]
    assert origins == [document.origin for document in documents]
    assert [getattr(result, "reason", None) for result in results] == [None, "empty_answer", None, "empty_answer", None]


# Places of removed documents


def test_the_first_ten_places_of_every_reason_are_named_in_the_order_of_the_source(config_of, tokenizer):
    good = [asked(f"What is {i}?") for i in range(300)]
    records = []
    for index, record in enumerate(good):  # more than a block, so that several workers find them
        records += [record, asked(f"{index}", "")] if index % 5 == 0 else [record]
        if index % 7 == 0:
            records += [record, {"messages": [{"role": "user", "content": f"{index}"}]}]
    config = config_of({"sums": records}, held_out=NEVER)
    manifest = prepare(config, tokenizer).manifest
    seen, places = [], {"empty_answer": [], "duplicate": [], "no_assistant_turn": []}
    for line, record in enumerate(records, start=1):
        if "messages" in record:
            places["no_assistant_turn"].append(line)
        elif not record["output"]:
            places["empty_answer"].append(line)
        elif record in seen:
            places["duplicate"].append(line)
        seen.append(record)
    assert len(records) > 2 * 256 - 128 and removed(manifest, "sums") == {r: len(lines) for r, lines in places.items()}
    for reason, lines in places.items():
        assert lines_of(manifest, "sums", reason) == lines[:10]


def test_rows_that_cannot_be_read_are_dropped_where_asked_and_end_it_else(config_of, tokenizer):
    records = [asked("a"), {"question": "b"}, asked("c"), {"instruction": "d"}, asked("e", None), asked("f")]
    config = config_of({"sums": records}, held_out=NEVER, cleaning={"bad_rows": "drop"})
    manifest = prepare(config, tokenizer).manifest
    assert removed(manifest, "sums") == {"bad_row": 3}
    found = manifest["removed"]["sums"]["bad_row"]["first"]
    path = config.sources[0].path
    assert [place.partition(": ")[0] for place in found] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    with pytest.raises(UserError, match=r"sums\.jsonl:2: fields \['question'\]; expected") as caught:
        prepare(config_of({"sums": records}, held_out=NEVER), tokenizer)
    assert "\n" not in str(caught.value)
