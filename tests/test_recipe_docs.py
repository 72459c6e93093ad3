"""docs/recipe.md says what the recipe's fields say."""

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from trainer.console.recipe_docs import OPENING, PAGE, page
from trainer.recipe import Recipe
from trainer.recipe_file import SOURCES, load_recipe


def sections(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield field.annotation
            yield from sections(field.annotation)


SECTIONS = [*sections(), *SOURCES.values()]


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "docs/recipe.md is stale; run `python -m trainer.console.recipe_docs`"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_has_a_description_of_one_line(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        if field.annotation not in SECTIONS:
            assert field.description and "\n" not in field.description, name


def test_every_key_has_a_row_with_its_type_and_default():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page().splitlines() if line.startswith("| `")]
    found = {key: (kind, default) for key, kind, default, _ in rows}
    assert len(rows) == sum(
        field.annotation not in SECTIONS for each in SECTIONS for field in each.model_fields.values()
    )
    assert found["`output_dir`"] == ("path", "`runs`")
    assert found["`nodes`"] == ("integer > 0 or null", "`null`")
    assert found["`warmup_ratio`"] == ("number ≥ 0 and < 1 or null", "`null`")
    assert found["`target_modules`"] == ("list of text", '`["gate_proj", "up_proj", "down_proj"]`')
    assert found["`betas`"] == ("[number ≥ 0 and < 1, number ≥ 0 and < 1]", "`[0.9, 0.999]`")
    assert found["`learning_rate`"] == ("number > 0", "`0.0002`")
    assert found["`global_batch_size`"] == ("integer > 0", "required")
    assert found["`dispatch`"] == ("`auto`, `weights`, `tokens`", "`auto`")


def test_the_example_on_the_page_is_a_whole_recipe(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", OPENING, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(example)
    assert load_recipe(tmp_path / "recipe.yaml").run.name == "first"
