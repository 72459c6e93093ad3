"""Whether a changed recipe may go on with a run."""

import json
from pathlib import Path

import pytest

from data_prep.differences import differences
from data_prep.user_error import UserError
from tests.support import scene
from trainer.checkpoint import storage
from trainer.checkpoint.manager import FACTS, FOLDER
from trainer.recipe import Recipe
from trainer.run import run_dir
from trainer.run.launch_protocol import AGAIN
from trainer.training.resume import (
    MAY_CHANGE,
    accept_recipe_changes,
    contents,
    find_again_if_changed,
    find_resume_point,
)

BASE = "base"


def accept(**changes):
    return accept_recipe_changes(scene.recipe(BASE), scene.recipe(BASE, **changes), "refused", "think again")


def test_what_only_changes_how_it_computes_is_told_and_accepted():
    lines = accept(train__micro_batch_size=2, experts__parallel_size=2, deepspeed__config="other.json")
    assert lines == [
        "changed         experts.parallel_size was 1 and is 2",
        "changed         train.micro_batch_size was 1 and is 2",
        "changed         deepspeed.config was 'ds_configs/zero3.json' and is 'other.json'",
    ]


@pytest.mark.parametrize(
    "changes", [{"adapter__alpha": 9}, {"train__learning_rate": 1}, {"run__seed": 4}, {"base__dtype": "bf16"},
                {"train__steps": 6}, {"data__seq_len": 128}]
)  # fmt: skip
def test_what_changes_the_run_is_refused_by_name(changes):
    (key,) = changes
    with pytest.raises(UserError, match=f"^refused: {key.replace('__', '.')} was .*; undo that or think again$"):
        accept(**changes)


def test_every_harmless_key_is_a_key_of_the_recipe():
    resolved = scene.recipe(BASE).model_dump(mode="json")
    for key in MAY_CHANGE:
        section, _, name = key.partition(".")
        assert not name or name in resolved[section], key


@pytest.fixture
def run(tmp_path):
    """A run that was stopped, with checkpoints of steps 2 and 4."""
    recipe = scene.recipe(BASE, run__output_dir=str(tmp_path))
    run_dir.create(recipe, {})
    for step in (2, 4):
        draft = storage.CheckpointWriter(recipe.run.directory / FOLDER, step)
        facts = {"step": step, "recipe": recipe.model_dump(mode="json"), "metrics_bytes": 10 * step}
        draft.add(FACTS, json.dumps(facts).encode())
        draft.publish()
    return recipe.run.directory


def begin(run, resume, name="test"):
    changes = {"run__output_dir": str(run.parent), "run__name": name, "train__resume": str(resume)}
    return find_resume_point(scene.recipe(BASE, **changes))


def test_a_run_goes_on_from_its_newest_intact_checkpoint(run):
    assert begin(run, "auto").step == 4 and begin(run, "auto").is_of(run)
    (run / FOLDER / "step-000004" / FACTS).write_text("{}")
    resume_point = begin(run, "auto")
    assert resume_point.step == 2 and resume_point.is_of(run)
    assert "step-000004 is skipped: run.json has 2 bytes" in "".join(resume_point.notes)


def test_a_run_is_recognised_by_whatever_path_its_checkpoint_is_given(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert begin(run, run / FOLDER / "step-000004").is_of(Path("test"))
    assert not begin(run, "test", name="fork").is_of(Path("fork"))


def test_a_checkpoint_is_the_runs_own_by_any_path_through_links(run, tmp_path):
    disk = tmp_path / "disk"
    (run / FOLDER).rename(disk)
    (run / FOLDER).symlink_to(disk)
    assert begin(run, "auto").is_of(run) and begin(run, disk / "step-000004").is_of(run)
    (disk / "step-000004").rename(tmp_path / "elsewhere")
    (disk / "step-000004").symlink_to(tmp_path / "elsewhere")
    assert begin(run, "auto").is_of(run)
    link = tmp_path / "link"
    link.symlink_to(run)
    assert begin(run, link).is_of(link)
    assert not begin(run, link, name="fork").is_of(run.parent / "fork")


def test_a_link_to_a_disk_that_is_not_mounted_is_refused(run, tmp_path):
    (run / FOLDER).rename(tmp_path / "away")
    (run / FOLDER).symlink_to(tmp_path / "disk")
    with pytest.raises(
        UserError, match=rf"^{run / FOLDER} is a link to {tmp_path / 'disk'}, which is no folder here; "
    ):
        begin(run, "auto")


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_folder_where_the_name_of_a_checkpoint_is_kept_is_refused(run, name):
    path = run / FOLDER / name
    path.unlink(missing_ok=True)
    path.symlink_to("step-000002")  # as users make it: the next save replaces it
    assert begin(run, "auto").step == 4
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError) as caught:
        begin(run, "auto")
    assert str(caught.value) == (
        f"{path} is a folder, but the run writes the name of a checkpoint into a file {name}; rename the folder"
    )


@pytest.mark.parametrize("name", ["latest", "best", "adapter", "checkpoints"])
def test_a_run_may_have_the_name_of_a_file_or_folder_in_runs(tmp_path, name):
    recipe = scene.recipe(BASE, run__output_dir=str(tmp_path), run__name=name)
    run_dir.create(recipe, {})
    assert run_dir.find(recipe) == recipe
    assert find_resume_point(recipe).step == 0


def test_going_back_within_a_run_is_refused_and_works_in_another(run):
    earlier = run / FOLDER / "step-000002"
    with pytest.raises(UserError, match="has a later checkpoint, of step 4; remove it, or go on in a run of its own"):
        begin(run, earlier)
    assert begin(run, earlier, name="fork").step == 2


def test_a_run_begun_from_another_goes_on_with_its_own_checkpoints(run):
    """The same command again, as retries and a requeued job give it."""
    other = run / FOLDER / "step-000002"
    recipe = scene.recipe(BASE, run__output_dir=str(run.parent), run__name="fork", train__resume=str(other))
    run_dir.create(recipe, {})
    assert find_resume_point(recipe).checkpoint == other
    draft = storage.CheckpointWriter(recipe.run.directory / FOLDER, 3)
    draft.add(FACTS, json.dumps({"step": 3, "recipe": recipe.model_dump(mode="json"), "metrics_bytes": 7}).encode())
    draft.publish()
    found = find_resume_point(recipe)
    assert (found.checkpoint, found.step) == (recipe.run.directory / FOLDER / "step-000003", 3)


@pytest.mark.parametrize(("keep_best", "known"), [(True, {}), (False, {"best_loss": 1.0, "best_step": 2, "since": 1})])
def test_a_best_of_another_run_is_no_best_of_this_one(run, keep_best, known):
    facts = run / FOLDER / "step-000004"
    told = {**json.loads((facts / FACTS).read_text()), "held_out": {"best_loss": 1.0, "best_step": 2, "since": 1}}
    draft = storage.CheckpointWriter(run / FOLDER, 4)
    draft.add(FACTS, json.dumps(told).encode())
    draft.publish()
    assert begin(run, "auto").facts["held_out"] == told["held_out"]
    changes = {"run__output_dir": str(run.parent), "run__name": "fork", "train__resume": str(facts)}
    assert find_resume_point(scene.recipe(BASE, checkpoint__keep_best=keep_best, **changes)).facts["held_out"] == known


def test_never_is_for_the_first_start_of_a_launch(run, monkeypatch):
    with pytest.raises(UserError, match=r"^train\.resume=never: .* holds an unfinished run"):
        begin(run, "never")
    monkeypatch.setenv(AGAIN, "1")
    assert begin(run, "never").step == 4


def test_a_start_that_was_killed_at_once_is_in_no_later_ones_way(tmp_path):
    recipe = scene.recipe(BASE, run__output_dir=str(tmp_path))
    recipe.run.directory.mkdir()
    (recipe.run.directory / ".recipe.yaml.part").write_text("ru")
    assert run_dir.find(recipe) is None
    (recipe.run.directory / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that belong to no run"):
        run_dir.find(recipe)


def test_a_new_volume_and_folders_to_mount_on_hold_no_run(tmp_path):
    recipe = scene.recipe(BASE, run__output_dir=str(tmp_path))
    for name in ("lost+found", "checkpoints", "checkpoints/lost+found"):
        (recipe.run.directory / name).mkdir(parents=True)
    assert run_dir.find(recipe) is None
    run_dir.create(recipe, {})
    assert run_dir.find(recipe) == recipe


def test_a_disk_that_could_not_take_the_adapter_is_refused_at_the_start(tmp_path, monkeypatch):
    recipe = scene.recipe(BASE, run__output_dir=str(tmp_path))

    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(
        UserError, match=r"^run\.output_dir=.*: cannot write .* \(its file system cannot rename folders"
    ):
        run_dir.create(recipe, {})
    assert list(recipe.run.directory.iterdir()) == []


def test_differences_are_found_at_any_depth():
    old = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    new = {"a": {"b": 1, "c": {"d": 3}}, "e": [1, 2], "f": 4}
    assert list(differences(old, new)) == [("a.c.d", 2, 3), ("e", [1], [1, 2]), ("f", None, 4)]


def test_a_recipe_reads_back_equal_from_a_checkpoint():
    recipe = scene.recipe(BASE)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_resume_point_is_found_again_only_if_another_launch_has_trained_since(run):
    recipe = scene.recipe(BASE, run__output_dir=str(run.parent))
    before = contents(run)
    found = find_resume_point(recipe)
    (run / ".lease").mkdir()
    (run / ".lease" / "mine").touch()
    identity = {"base_fingerprint": "f", "prepared_key": "k"}
    assert find_again_if_changed(found, before, recipe, identity) is found
    writer = storage.CheckpointWriter(run / FOLDER, 6)
    writer.add(FACTS, json.dumps({"step": 6, "metrics_bytes": 60, **identity}).encode())
    writer.publish()
    assert find_again_if_changed(found, before, recipe, identity).step == 6
    with pytest.raises(UserError, match=r"^base\.model holds something else than when .*step-000006 was saved"):
        find_again_if_changed(found, before, recipe, {**identity, "base_fingerprint": "g"})
