"""Recipe files: YAML read, overridden, validated and written. Every mistake becomes a one-line UserError."""

import difflib
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.config import Source
from data_prep.recipe_yaml import RepeatedKey, UnclearNumber, dump_yaml, load_yaml
from data_prep.user_error import UserError
from trainer.recipe import Recipe

# The sections that an item of data.sources can be, by their tag `type`.
SOURCES: dict[str, type[BaseModel]] = {
    get_args(source.model_fields["type"].annotation)[0]: source for source in get_args(get_args(Source)[0])
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe, applies `key.path=value` overrides in order and validates the result.

    An integer in a key path addresses an item of a list: `data.sources.0.path=rows.jsonl`. Raises UserError for every
    mistake a user can make.
    """
    values = _read_yaml(path)
    for override in overrides:
        values = _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Recipe)}") from None
    for key in _booleans_as_numbers(values, recipe.model_dump(), ""):
        raise UserError(f"{path}: {key}: expected a number, but YAML reads yes, on and true as a boolean; write one")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe reads it back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"recipe {path}: {reason}; give the path of a YAML recipe, see launch/recipes/") from None
    except RepeatedKey as error:
        raise UserError(
            f"recipe {path}: key {error.key} is given twice, on lines {error.first} and {error.second}; remove one"
        ) from None
    except UnclearNumber as error:
        raise UserError(f"recipe {path}, line {error.line}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected sections run, base, ... at top level; see launch/recipes/")
    return values


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise UserError(f"argument {override!r}: expected key.path=value, for example train.steps=100")
    try:
        value = load_yaml(text, at=key)
    except RepeatedKey as error:
        raise UserError(f"argument {override!r}: key {error.key} is given twice; remove one") from None
    except UnclearNumber as error:
        raise UserError(f"argument {override!r}: {error}") from None
    except yaml.YAMLError:
        raise UserError(f"argument {override!r}: the value is not YAML; quote it") from None
    try:
        return _replaced(values, path, value, "")
    except LookupError as error:
        raise UserError(f"argument {override!r}: {error.args[0]}") from None


def _replaced(place: Any, path: Sequence[str], value: Any, at: str) -> Any:
    """A copy of `place` with the value at `path`. `at`: where `place` is. Raises LookupError, with a message.

    Only what lies on the path is copied, never changed: with YAML aliases it may be in other places of the recipe too.
    """
    if not path:
        return value
    part, *rest = path
    here = f"{at}.{part}" if at else part
    if isinstance(place, list):
        index = _index(place, part, at)
        return [*place[:index], _replaced(place[index], rest, value, here), *place[index + 1 :]]
    if not isinstance(place, dict):
        raise LookupError(f"{at} is a value, not a section with keys; remove .{part}")
    return {**place, part: _replaced(place.get(part, {}), rest, value, here)}


def _index(items: list[Any], part: str, at: str) -> int:
    indices = [str(index) for index in range(len(items))]  # no int(part), which may have thousands of digits
    if part in indices:
        return indices.index(part)
    if not items:
        raise LookupError(f"{at} is an empty list; give it whole, as {at}=[...]")
    allowed = "index 0" if len(items) == 1 else f"an index from 0 to {len(items) - 1}"
    raise LookupError(f"{at} is a list of length {len(items)}, so {part} addresses no item; use {allowed}")


def _booleans_as_numbers(given: Any, read: Any, at: str) -> Iterator[str]:
    """Keys of booleans that pydantic took for 0 or 1."""
    if isinstance(given, bool):
        if type(read) in (int, float):
            yield at
    elif isinstance(given, dict) and isinstance(read, dict):
        for key in given.keys() & read.keys():
            yield from _booleans_as_numbers(given[key], read[key], f"{at}.{key}" if at else key)
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for index, pair in enumerate(zip(given, read, strict=False)):
            yield from _booleans_as_numbers(*pair, f"{at}[{index}]")


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as `key=value: what was expected; what to do`. root: what was validated."""
    problems = error.errors()
    # A misspelled required key is reported as missing before it is reported as unknown.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    *parents, last = first["loc"] or [""]
    of_value = [first]
    if _takes_several_types(parents, root):
        of_value = [problem for problem in problems if list(problem["loc"][:-1]) == parents]
        *parents, last = parents
    key = _dotted((*parents, last)) if last != "[key]" else f"a key of {_dotted(parents[:-1])}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(first['loc'], root)}"
    if first["type"] == "invalid_key":  # a key that is no text
        return f"unknown key {_dotted((*parents, str(first['input'])))}{_nearest(first['loc'], root)}"
    if first["type"] == "missing":
        return f"missing key {key}: add it"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    if first["type"] in ("string_type", "path_type") and isinstance(first["input"], float | int | date | None):
        return f"{key}: expected text, but this is read as {_kind(first['input'])}; put text in quotes"
    text = " or ".join(problem["msg"] for problem in of_value).replace(" or Input should be ", " or ")
    expected = text[0].lower() + text[1:].partition(" or instance of ")[0]
    return f"{key}={_shown(first['input'])}: {expected}; change it"


def _takes_several_types(location: Sequence[int | str], root: type[BaseModel]) -> bool:
    """Whether a key's value may have one of several types: pydantic then reports a problem per type, as if of a key."""
    if not location:
        return False
    field = _section_at(location[:-1], root).model_fields.get(str(location[-1]))
    if field is None or get_origin(field.annotation) not in (Union, UnionType):
        return False
    return len(set(get_args(field.annotation)) - {NoneType}) > 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind(value: float | date | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    return f"the {'date' if isinstance(value, date) else 'number'} {value}"


def _dotted(location: Sequence[int | str]) -> str:
    """('data', 'sources', 0, 'files', 'path') -> data.sources[0].path: pydantic adds the tag, which is no key."""
    text = ""
    for before, part in zip((None, *location), location, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not isinstance(before, int) or part not in SOURCES:
            text += f".{part}" if text else part
    return text


def _nearest(location: Sequence[int | str], root: type[BaseModel]) -> str:
    *parents, name = location
    siblings = {field: _dotted((*parents, field)) for field in _section_at(parents, root).model_fields}
    elsewhere = {key.rpartition(".")[2]: key for key in _known_keys(root)}
    if name in elsewhere:  # a known key in the wrong place
        return f"; did you mean {elsewhere[name]}?"
    for keys in (siblings, elsewhere):
        if near := difflib.get_close_matches(str(name).lower(), keys, n=1, cutoff=0.6):
            return f"; did you mean {keys[near[0]]}?"
    return f"; known keys: {', '.join(siblings.values())}"


def _section_at(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel]:
    section = root
    for part in location:
        if part in SOURCES:
            section = SOURCES[part]
        elif part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section = annotation if is_section(annotation) else section
    return section


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if is_section(field.annotation):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a field's type is a section, with keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
