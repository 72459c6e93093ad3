"""DeepSpeed's JSON file as people bring it, from the HF trainer for example: read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.sources.text import first_repeated
from data_prep.user_error import UserError
from trainer.distributed.deepspeed_sections import DeepSpeedFile
from trainer.recipe_file import explain
from trainer.run.resources import find_deepspeed_config


def read_deepspeed_file(value: Path) -> dict[str, Any]:
    """What the file that `deepspeed.config` means says, with numbers as numbers and without what is left to defaults.

    Raises UserError for a file that cannot be read, and for keys and values that DeepSpeed would not take, would ignore
    or that belong to the recipe.
    """
    given = _read_json(find_deepspeed_config(value))
    try:
        file = DeepSpeedFile.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{value}: {explain(error, DeepSpeedFile)}") from None
    if file.fp16.enabled:
        raise UserError(f"{value}: fp16.enabled=true: expected base.dtype bf16 or fp32; remove fp16 from the file")
    return file.model_dump(exclude_unset=True, exclude_none=True, exclude={"fp16"})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeated_keys)
    except OSError as error:
        raise UserError(
            f"deepspeed.config={path}: {error.strerror}; give a file such as ds_configs/zero3.json"
        ) from None
    except (ValueError, RecursionError) as error:  # lists in lists, over and over
        raise UserError(f"deepspeed.config={path}: not JSON ({error}); compare with ds_configs/zero3.json") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(
            f"deepspeed.config={path}: expected a JSON object with a section zero_optimization; "
            "compare with ds_configs/zero3.json"
        )
    return config


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads would keep the last value of a key and drop the others silently."""
    if (key := first_repeated([key for key, _ in pairs])) is not None:
        raise ValueError(f"key {key} is given twice; remove one")
    return dict(pairs)
