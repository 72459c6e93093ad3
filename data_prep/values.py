"""Values within a record, in the shapes in which JSON files and tables store them."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from data_prep.sources.json_array import DEEPEST
from data_prep.sources.text import without_repeats
from data_prep.user_error import UserError

_ANSWERS = ("output", "completion")
_BLANK = ("", "null", "[]", "{}")  # texts without a value


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """The text in a field; a number becomes text. Raises UserError, which begins with `where`, for anything else."""
    if field not in record:
        advice = "add it, or name it under the source's `fields`" if field in _ANSWERS else "add the field"
        raise UserError(f"{where}: lacks field `{field}`; it has {shown_names(record)}, {advice}")
    value = number_as_text(decoded(record[field]))
    if value is None:
        raise UserError(f"{where}: field `{field}` is null; expected text, correct or remove the record")
    if isinstance(value, float | Decimal):
        raise UserError(f"{where}: field `{field}` is {value}; expected text, correct or remove the record")
    if isinstance(value, bytes):
        raise UserError(f"{where}: field `{field}` is bytes that are not UTF-8; expected text, correct it")
    if not isinstance(value, str):
        raise UserError(f"{where}: field `{field}` is {kind_of(value)}; expected text, put it in quotes")
    refuse_surrogates(value, field, where)
    return value


def number_as_text(value: Any) -> Any:
    """A finite number as text, with the digits of a decimal as they were written; any other value unchanged."""
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return value if isinstance(value, float) and not math.isfinite(value) else str(value)


def decoded(value: Any) -> Any:
    """The text in UTF-8 bytes, as tables with binary columns store it; any other value unchanged."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def parsed(value: Any) -> Any:
    """The list or object in a JSON text, as tables store them; any other value unchanged."""
    value = decoded(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError):
            return value
    return value


def as_object(value: Any) -> Any:
    """The object in a JSON text or in [key, value] pairs, as tables store maps; any other value unchanged."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        return value
    pairs = [(part["key"], part["value"]) if _is_entry(part) else part for part in value]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        return value
    named = dict(pairs)
    return named if len(named) == len(pairs) else value


def _is_entry(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {"key", "value"}


def as_json(value: Any, field: str, where: str) -> Any:
    """A value that chat templates can write as JSON; what only tables hold is converted, see _plain.

    Raises UserError for others, such as dates in tables, NaN, and deep nesting.
    """
    if not _is_shallow(value, DEEPEST):
        raise UserError(f"{where}: field `{field}` has over {DEEPEST} nested lists and objects; simplify it")
    value = _plain(value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: field `{field}` is not JSON ({error}); correct it") from error
    refuse_surrogates(text, field, where)
    return value


def _plain(value: Any) -> Any:
    """The value with decimals as numbers, UTF-8 bytes as text and maps, which are lists of tuples, as objects."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(part, tuple) for part in value)
        return _plain(as_object(value)) if is_map else [_plain(part) for part in value]
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    return decoded(value)


def _is_shallow(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, a blank text, or a list or object without parts, also as JSON text."""
    return value.strip() in _BLANK if isinstance(value, str) else value in (None, b"", [], {})


def is_blank(value: Any) -> bool:
    """The same, and a list or object whose parts all say nothing, such as `[""]` or `{"path": null}`."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(is_blank, parts)) if parts else is_empty(value)


def refuse_surrogates(text: str, field: str, where: str) -> None:
    """Raises UserError for a text that cannot be encoded: JSON can escape half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field `{field}` holds half a surrogate pair at character {error.start}; remove it"
        ) from error


def shown_names(record: Mapping[str, Any]) -> str:
    """Sorted field names, the first twelve if there are more."""
    names = sorted(map(str, record))
    return str(names[:12]).removesuffix("]") + f", ... {len(names)} in total]" if len(names) > 12 else str(names)


def kind_of(value: Any) -> str:
    """The kind of a value in words, for error messages."""
    names = {
        type(None): "null", bool: "true or false", int: "number", float: "number", Decimal: "number", list: "list",
        dict: "object", str: "text",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__) if value != [] else "an empty list"
