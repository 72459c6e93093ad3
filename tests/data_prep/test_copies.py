"""Copies and near copies among documents: which are removed, and which stay."""

import random
import re

import numpy as np
import pytest

from data_prep import duplicates
from data_prep.documents import Document, normalize_text
from data_prep.duplicates import MinHasher, NearDuplicateFilter
from data_prep.prepare import find_unchanged_set, prepare
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from tests.data_prep.documents import described
from tests.data_prep.test_removed_documents import NEVER, asked, conversation, lines_of, removed
from tests.support.minimal_recipe import MINIMAL
from trainer.recipe_file import load_recipe

pytestmark = pytest.mark.usefixtures("without_pictures")

# Copies


@pytest.mark.parametrize(
    ("text", "copy"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("a\nb", "a\r\nb"),
        ("a\nb", "a\rb"),
        ("a\nb", "a \t\nb"),
        ("a\n\nb", "a\n \nb\t"),
        ("a", "\n a \n"),
        ("a\u2028b\nc", "a\u2028b \nc"),
        ("a\u00a0\nb", "a\u00a0 \nb"),
    ],
)
def test_invisible_differences_do_not_make_another_document(text, copy):
    assert normalize_text(text) == normalize_text(copy)
    assert described([text])["high"] == described([copy])["high"]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Polish", "polish"),
        ("if a:\n  b", "if a:\n    b"),
        ("if a:\n\tb", "if a:\n  b"),
        ("a b", "a  b"),
        ("a\nb", "a\n\nb"),
        ("a b", "a\u00a0b"),
        ("\ufb01", "fi"),  # one Unicode letter that looks like two: composed, but not replaced
        ("\u2460", "1"),
        ("a\u2028b \nc", "a\nb\nc"),
    ],
)
def test_case_indentation_and_inner_blanks_make_another_document(text, other):
    assert normalize_text(text) != normalize_text(other)
    assert described([text])["high"] != described([other])["high"]


def test_a_document_is_all_its_turns_with_their_roles_and_tools():
    def digest(*messages: tuple[str, str], **keys: object) -> bytes:
        turns = [{"role": role, "content": content} for role, content in messages]
        return Document("task", turns, "file:1", "chat", **keys).digest(0, None)

    different = [
        digest(("user", "a"), ("assistant", "b")),
        digest(("user", "a"), ("assistant", "c")),
        digest(("system", "a"), ("assistant", "b")),
        digest(("user", "a\n\nb"), ("assistant", "")),
        digest(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}]),
        digest(text="a\nb"),
    ]
    assert len(set(different)) == len(different)
    elsewhere = Document("other", [{"role": "user", "content": "a"}, {"content": "b", "role": "assistant"}], "x:9", "y")
    assert elsewhere.digest(0, None) == different[0] != elsewhere.digest(1, None)


def test_a_system_turn_that_is_the_recipes_makes_no_other_document():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = Document("task", turns, "file:1")
    spelt_out = Document("task", [{"role": "system", "content": " Be kind.\n"}, *turns], "file:2")
    assert plain.digest(0, "Be kind.") == spelt_out.digest(0, "Be kind.") == plain.digest(0, None)
    assert spelt_out.digest(0, "Be brief.") != plain.digest(0, "Be brief.")


def test_copies_of_which_other_answers_are_learned_stay(config_of, tokenizer):
    def weighted(first: int, second: int) -> dict:
        answers = ({"role": "assistant", "content": c, "weight": w} for c, w in (("one", first), ("two", second)))
        question = {"role": "user", "content": "Count."}
        return {"messages": [turn for answer in answers for turn in (question, answer)]}

    records = [weighted(0, 1), weighted(1, 0), weighted(0, 1), weighted(1, 0)]
    manifest = prepare(config_of({"words": records}, held_out=NEVER), tokenizer).manifest
    assert lines_of(manifest, "words", "duplicate") == [3, 4]
    config = config_of({"words": [*records, asked("a")]}, held_out=1)  # which are the copies, by their hash
    assert removed(prepare(config, tokenizer).manifest, "words") == {"duplicate_of_held_out": 3}


def test_tool_calls_count_when_finding_near_copies():
    question = {"role": "user", "content": "Turn it on"}
    calls = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "on", "arguments": {"x": x}}}]}
        for x in ("the lamp on the desk", "the radio in the kitchen", "the lamp on the desk")
    ]
    signatures = MinHasher().sign([Document("task", [question, call], "file:1") for call in calls])
    same, other = (np.mean(signatures[0] == signatures[i]) for i in (2, 1))
    assert same == 1 and other < 0.8


def likeness(first: Document, second: Document) -> float:
    signatures = MinHasher().sign([first, second])
    return np.mean(signatures[0] == signatures[1])


def test_a_long_system_turn_makes_no_near_copies():
    system = ("system", " ".join(f"rule {i}" for i in range(100)))
    asked = [conversation(system, ("user", f"Is {n} odd?"), ("assistant", a)) for n, a in ((3, "yes"), (4, "no"))]
    assert likeness(*asked) < 0.2
    assert likeness(asked[0], conversation(("user", "Is 3 odd?"), ("assistant", "yes"))) == 1


@pytest.mark.parametrize("text", ["风很大我们明天不去公园了", "วันนี้อากาศดีมากเราไปกินข้าวกัน", "ថ្ងៃនេះអាកាសធាតុល្អណាស់"])
def test_near_copies_are_found_in_scripts_without_blanks(text):
    other = [conversation(("user", said), ("assistant", "4")) for said in (text * 2 + text[::-1], text[::-1] * 3)]
    near = conversation(("user", text * 2 + text[::-1] + text[:1]), ("assistant", "4"))
    assert likeness(near, other[0]) > 0.8 > 0.5 > likeness(near, other[1])


@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_copies_are_dropped_or_kept_and_those_of_held_out_documents_always_go(config_of, tokenizer, choice):
    sums = [asked(f"What is {i}?") for i in range(30)]
    copies = [asked(f" What is {i}? \r\n") for i in range(30)]
    words = [asked(f"Sort {i}.") for i in range(9)] + sums[:20]  # copies in another task
    config = config_of({"sums": sums + copies, "words": words}, held_out=5, cleaning={"duplicates": choice})
    manifest = prepare(config, tokenizer).manifest
    prepared = open_prepared(config, tokenizer)
    held_out = [(item["task"], item["messages"][-1]["content"].strip()) for item in prepared.items]
    texts = {text for _, text in held_out}
    for task, records in (("sums", sums + copies), ("words", words)):
        everywhere = sum(record["instruction"].strip() in texts for record in records)
        here = sum(of == task for of, _ in held_out)
        assert here == 5
        assert removed(manifest, task).get("duplicate_of_held_out", 0) == everywhere - here
    left = sum(record["instruction"] not in texts for record in sums)
    assert removed(manifest, "sums").get("duplicate", 0) == (left if choice == "drop" else 0)
    trained = manifest["splits"]["train"]["tasks"]["sums"]["documents"]
    assert trained == left * (1 if choice == "drop" else 2)
    text = tokenizer.decode(np.concatenate([row["input_ids"] for row in prepared.train]))
    questions = re.findall(r"user\n(.*?)<\|im_end", text, re.DOTALL)
    assert len(questions) > trained and not texts & {question.strip() for question in questions}


# Near copies


def words_of(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def signed(texts: list[str]) -> np.ndarray:
    return MinHasher().sign([Document("task", [], f"file:{i}", "text", text=text) for i, text in enumerate(texts)])


def jaccard(a: str, b: str) -> float:
    """Of the sets of runs of five words."""
    first, second = ({tuple(text.split()[i : i + 5]) for i in range(len(text.split()) - 4)} for text in (a, b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("changed", [1, 5, 20, 60])
def test_signatures_agree_as_often_as_runs_of_words_are_shared(changed):
    estimates, truths = [], []
    for seed in range(20):
        words = words_of(300, seed)
        other = [*words]
        for place in random.Random(seed).sample(range(300), changed):
            other[place] = "changed"
        texts = [" ".join(words), " ".join(other)]
        first, second = signed(texts)
        estimates.append(np.mean(first == second))
        truths.append(jaccard(*texts))
    # the estimate's standard deviation is at most half of 1 / sqrt(128), that of the mean of 20 a 4.5th of it
    assert np.mean(estimates) == pytest.approx(np.mean(truths), abs=4 * 0.5 / (128 * 20) ** 0.5)


def test_documents_over_the_threshold_go_and_those_below_it_stay():
    base = [words_of(200, seed) for seed in range(100)]
    near = [[*words[:100], "changed", *words[101:]] for words in base]  # 5 of 196 runs are others
    just = [[*words[:100], *words_of(12, 500 + i), *words[112:]] for i, words in enumerate(base)]  # 16 are others
    below = [[*words[:100], *words_of(38, 1000 + i), *words[138:]] for i, words in enumerate(base)]  # 42 are others
    texts = [" ".join(words) for words in base + near + just + below]
    assert jaccard(texts[0], texts[100]) == pytest.approx(191 / 201)
    assert jaccard(texts[0], texts[200]) == pytest.approx(180 / 212)
    assert jaccard(texts[0], texts[300]) == pytest.approx(154 / 238)
    finder = NearDuplicateFilter(0.8, tasks=1)
    finder.add(described(texts), signed(texts))
    # Estimates deviate by sqrt(s (1 - s) / 128): at 0.65 one of 5,000 is over 0.8, at 0.85 one of 17 is below it.
    assert finder.kept[:100].all() and finder.kept[300:].all()
    assert not finder.kept[100:200].any()
    assert np.count_nonzero(finder.kept[200:300]) <= 20


def test_near_copies_in_other_tasks_stay_and_pieces_of_a_document_go_together():
    texts = [" ".join(words_of(50, 0)), " ".join([*words_of(50, 0), "more"])]
    pieces = np.concatenate([described(texts[:1]), described(texts[:1], task=1), described(texts[1:], pieces=3)])
    pieces["number"] = [0, 1, 2, 2, 2]
    finder = NearDuplicateFilter(0.8, tasks=2)
    finder.add(pieces, signed([texts[0], texts[0], *[texts[1]] * 3]))
    assert finder.kept.tolist() == [True, True, False, False, False]


def test_near_copies_are_counted_apart_from_copies_and_named(config_of, tokenizer):
    essays = [" ".join(words_of(60, seed)) for seed in range(12)]
    sums = [asked("Write.", text) for text in [*essays, essays[0] + " end", essays[0], essays[3].upper(), "short"]]
    config = config_of(
        {"sums": sums, "words": [asked("Write.", essays[1] + " end")]},
        seq_len=2048, held_out=NEVER, cleaning={"near_duplicates": 0.8},
    )  # fmt: skip
    manifest = prepare(config, tokenizer).manifest
    assert removed(manifest, "sums") == {"near_duplicate": 2, "duplicate": 1}
    assert removed(manifest, "words") == {}
    assert lines_of(manifest, "sums", "near_duplicate") == [13, 15]
    assert lines_of(manifest, "sums", "duplicate") == [14]
    assert manifest["splits"]["train"]["tasks"]["sums"]["documents"] == 13
    assert "datasketch" in manifest["libraries"]


@pytest.mark.parametrize(
    ("cleaning", "message"),
    [
        ("{near_duplicates: 0.8, duplicates: keep}", r"data\.cleaning: keeps duplicates but drops near .*; set one of"),
        ("{near_duplicates: 1}", r"data\.cleaning\.near_duplicates=1: input should be less than 1; change it$"),
        ("{near_duplicates: 0}", r"data\.cleaning\.near_duplicates=0: input should be greater than 0; change it$"),
        ("{duplicates: skip}", r"data\.cleaning\.duplicates='skip': input should be 'drop' or 'keep'; change it$"),
        ("{bad_rows: skip}", r"data\.cleaning\.bad_rows='skip': input should be 'refuse' or 'drop'; change it$"),
        ("{near_duplicate: 0.8}", r"unknown key data\.cleaning\.near_duplicate; did you mean .*\.near_duplicates\?$"),
    ],
)
def test_contradictory_cleaning_options_give_a_one_line_error(tmp_path, cleaning, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(recipe, [f"data.cleaning={cleaning}"])
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_reported_before_any_work(config_of, tokenizer, monkeypatch):
    config = config_of(cleaning={"near_duplicates": 0.8})
    monkeypatch.setattr(duplicates.importlib.util, "find_spec", lambda name: None)
    for run in (lambda: prepare(config, tokenizer), lambda: find_unchanged_set(config, [])):
        with pytest.raises(
            UserError,
            match=r"^data\.cleaning\.near_duplicates: needs the package datasketch, .*"
            r"`pip install 'teamlora\[near-duplicates\]'`",
        ) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert {path.name for path in config.prepared_dir.parent.iterdir()} == {"sums.jsonl", "words.jsonl"}
