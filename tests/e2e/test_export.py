"""A trained run, exported by the real command in each form."""

import json

import pytest

pytestmark = pytest.mark.slow

FORMS = {
    "export-peft": ["--to", "peft"],
    "export-lora": ["--to", "lora"],
    "export-merged": ["--to", "merged"],
    "export-merged-dequantised": ["--to", "merged", "--base", "dequantised"],
}


@pytest.fixture(scope="module")
def trained(workplace):
    done = workplace.teamlora("train", "recipe.yaml", "run.name=exported", "train.learning_rate=0.05")
    assert done.returncode == 0, done.stderr
    return workplace.folder / "runs" / "exported"


def test_every_form_is_written_and_its_price_printed_and_kept(workplace, trained):
    for name, options in FORMS.items():
        done = workplace.teamlora("export", "runs/exported", *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"runs/exported/{name}: ")
        price = json.loads((trained / name / "export.json").read_text())["price"]
        if name == "export-peft":
            assert price is None
            continue
        rows = [line.split() for line in done.stdout.splitlines()[3:]]
        assert [row[0] for row in rows] == ["upper", "twice", "all"]
        assert [float(row[2]) for row in rows] == pytest.approx([line["kl"] for line in price], rel=6e-3)


def test_a_task_that_is_none_ends_with_status_2_and_one_line(workplace, trained):
    done = workplace.teamlora("export", "runs/exported", "--to", "lora", "--task", "sums", "--output", "other")
    assert done.returncode == 2
    assert done.stderr == "error: --task sums: runs/exported has no such task; it has upper, twice\n"
    assert not (workplace.folder / "other").exists()
