"""Models whose runs were trained on another prepared set than the one that is asked from are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.minimal_recipe import MINIMAL
from trainer.evaluation.asked_items import Acquaintance, acquaintances


def item(question: str, system: str | None = None) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    turns = [*before, {"role": "user", "content": question}]
    return {"task": "sums", "messages": turns, "answer": f"answer to {question}"}


ASKED = [item("one"), item("two"), item("three")]


def make_set(folder: Path, key: str, items: list[dict[str, Any]]) -> Path:
    """What is read of a prepared set here."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format_version": 2, "key": key}))
    (folder / "items.jsonl").write_text("".join(json.dumps(each) + "\n" for each in items))
    return folder


def make_run(folder: Path, prepared_dir: Path, environment: Any) -> Path:
    """A run's adapter folder."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(MINIMAL.replace("prepared_dir: prepared", f"prepared_dir: {prepared_dir}"))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder / "adapter"


def known_of(adapter: Path, key: str = "asked") -> Acquaintance:
    return acquaintances({"base": None, "other": adapter}, key, ASKED)["other"]


def test_a_run_of_the_same_set_has_not_learned_its_held_out_items(tmp_path):
    adapter = make_run(tmp_path / "run", tmp_path / "moved", [{"prepared_key": "old"}, {"prepared_key": "asked"}])
    assert known_of(adapter) == Acquaintance(0)
    assert known_of(adapter).warning("other", 3) is None


def test_items_that_the_other_set_does_not_hold_out_may_have_been_learned(tmp_path):
    prepared = make_set(tmp_path / "prepared", "other", [item("four"), item("two", system="Be short.")])
    adapter = make_run(tmp_path / "run", prepared, [{"prepared_key": "other"}])
    assert known_of(adapter) == Acquaintance(2, str(prepared))
    assert known_of(adapter).warning("other", 3) == (
        f"warning: other was trained on another prepared set ({prepared}), which does not hold out 2 of the 3 asked "
        "items: it may have learned them; compare runs on one set"
    )


def test_another_set_that_holds_out_the_same_items_is_as_good(tmp_path):
    prepared = make_set(tmp_path / "prepared", "other", [*ASKED, item("four")])
    assert known_of(make_run(tmp_path / "run", prepared, [{"prepared_key": "other"}])).may_have_learned == 0


@pytest.mark.parametrize("there", ["replaced", "gone", "damaged"])
def test_of_a_set_that_is_not_there_any_more_nothing_is_known_to_be_held_out(tmp_path, there):
    prepared = tmp_path / "prepared"
    if there != "gone":
        make_set(prepared, "newer" if there == "replaced" else "other", ASKED)
    if there == "damaged":
        (prepared / "items.jsonl").write_text("[[[\n")
    assert known_of(make_run(tmp_path / "run", prepared, [{"prepared_key": "other"}])).may_have_learned == 3


@pytest.mark.parametrize("environment", [[], [{}], 3, {"prepared_key": "asked"}, [3], None])
def test_where_no_run_says_its_set_that_is_reported(tmp_path, environment):
    known = known_of(make_run(tmp_path / "run", tmp_path / "prepared", environment))
    assert known == Acquaintance(None)
    assert known.warning("other", 3) == (
        "warning: no run says which prepared set other was trained on: it may have learned the asked items"
    )
    assert known_of(tmp_path / "an adapter alone") == Acquaintance(None)


def test_a_run_of_an_earlier_version_says_it_in_its_checkpoints(tmp_path):
    adapter = make_run(tmp_path / "run", tmp_path / "prepared", [{"step": 0}])
    for step, key in ((2, "before"), (4, "asked")):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").write_text(json.dumps({"step": step, "prepared_key": key}))
    assert known_of(adapter) == Acquaintance(0)
