"""Values of Arrow columns as they were written: JSON texts and maps as objects, bytes as text, 0.1 and not
0.10000000149011612."""

import json
from collections.abc import Callable
from typing import Any

from data_prep.sources.text import without_repeats

Converter = Callable[[Any], Any]

_EXACT = 2**53  # floats hold every whole number up to here


def record_converter(schema: Any) -> Converter:
    """Makes records of rows as pyarrow's to_pylist gives them; raises ValueError with the column for a bad value.

    schema: pyarrow.Schema. Leaves out the nulls that fill up columns which a record does not use.
    """
    columns = {field.name: _converter(field.type) for field in schema}

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        record = {}
        for name, value in row.items():
            try:
                value = None if value is None else columns[name](value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"column `{name}` is damaged ({error}); correct it") from error
            if value is not None:
                record[name] = value
        return record

    return convert


def _converter(kind: Any) -> Converter:
    """Converts values of a pyarrow type that are not null."""
    import pyarrow

    types = pyarrow.types
    if isinstance(kind, pyarrow.JsonType):
        return _parse
    if types.is_map(kind):
        return _map(_converter(kind.key_type), _converter(kind.item_type))
    if types.is_struct(kind):
        return _struct({field.name: _converter(field.type) for field in kind})
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if hasattr(kind, "value_type"):  # the kinds of lists
        return _list(_converter(kind.value_type))
    if types.is_floating(kind):
        return _short_float(kind.to_pandas_dtype()) if kind.bit_width < 64 else _whole
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return _text if is_bytes or types.is_fixed_size_binary(kind) else _same


def _same(value: Any) -> Any:
    return value


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=without_repeats)


def _struct(fields: dict[str, Converter]) -> Converter:
    def convert(struct: dict[str, Any]) -> dict[str, Any]:
        parts = {name: fields[name](part) for name, part in struct.items() if part is not None}
        return {name: part for name, part in parts.items() if part is not None}

    return convert


def _list(item: Converter) -> Converter:
    def convert(values: list[Any]) -> list[Any]:
        return [None if value is None else item(value) for value in values]

    return _same if item is _same else convert


def _map(key: Converter, item: Converter) -> Converter:
    """An object, as in JSON: keys are texts, and a null is a value, since no other row's keys fill this one up."""

    def convert(pairs: list[tuple[Any, Any]]) -> Any:
        named = [(key(name), None if part is None else item(part)) for name, part in pairs]
        if not all(isinstance(name, str | int) for name, _ in named):
            return [list(pair) for pair in named]
        return without_repeats([(str(name), part) for name, part in named])

    return convert


def _whole(value: float) -> float | int:
    """A whole number again, if it became a float beside a null or a fraction."""
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


def _short_float(kind: Callable[[float], Any]) -> Converter:
    """The shortest number that this narrower type rounds to the value."""

    def convert(value: float) -> float | int:
        value = float(value)
        exact = _whole(value)
        return exact if isinstance(exact, int) else float(str(kind(value)))

    return convert


def _text(value: bytes) -> str | bytes:
    """The text, since many writers store it as bytes; bytes that are not UTF-8 stay."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
