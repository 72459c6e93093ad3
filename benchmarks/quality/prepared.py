"""The prepared set of all cells."""

from benchmarks.quality.settings import Cell, recipe_of
from data_prep.fingerprint import tokenizer_files
from data_prep.prepare import find_unchanged_set, prepare
from trainer.base.model_config import load_tokenizer
from trainer.base.model_folder import resolve_folder


def prepare_for(cell: Cell, base: str) -> None:
    """Makes it where it is missing or of other code. Raises UserError where it cannot be made."""
    recipe = recipe_of(cell, base)
    files = tokenizer_files(resolve_folder(recipe.base), recipe.data)
    if find_unchanged_set(recipe.data, files) is None:
        print(prepare(recipe.data, load_tokenizer(recipe.base, recipe.data.chat_template), files))
