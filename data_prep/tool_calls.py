"""Tools, tool calls and their results, in the shapes that chat templates expect."""

from collections import Counter
from collections.abc import Mapping
from itertools import groupby, takewhile
from typing import Any

from data_prep.documents import Message
from data_prep.fields import Fields, Spellings
from data_prep.user_error import UserError
from data_prep.values import as_json, as_object, is_blank, is_empty, kind_of, parsed, text_of

_CALL = Spellings(
    {
        "name": ("name", "function", "function_name", "tool", "tool_name"),
        "arguments": (
            "arguments", "parameters", "input", "args", "kwargs", "params", "inputs", "tool_input", "function_args",
            "function_arguments", "tool_args", "tool_arguments", "argument", "parameter",
        ),
        "id": ("id", "call_id", "tool_call_id"),
        "kind": ("type", "index"),  # all calls are functions, in their order
    }
)  # fmt: skip
_SCHEMA = ("parameters", "input_schema", "inputSchema")  # of a tool's arguments, as OpenAI, Anthropic and MCP name it


def read_calls(value: Any, where: str, unread: set[str]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects. Adds the names of fields that are not read to `unread`."""
    value = parsed(value)
    calls = value if isinstance(value, list) else [value]
    return [_read_call(as_object(call), f"{where}: tool call {index}", unread) for index, call in enumerate(calls)]


def _read_call(call: Any, where: str, unread: set[str]) -> dict[str, Any]:
    fields = Fields(_flattened(call, where), _CALL, where)
    name, identity, arguments = (fields.take(meaning) for meaning in ("name", "id", "arguments"))
    fields.remove(*fields.spelt("kind"))
    if name is None or not isinstance(fields.values[name], str) or not fields.values[name].strip():
        raise UserError(f"{where} is {kind_of(call)} without `name`; expected an object with `name` and `arguments`")
    if fields.left and (arguments is None or _is_missing(fields.values[arguments])):
        raise UserError(
            f"{where}: has `{fields.left[0]}` but no `arguments`; expected an object with `name` and `arguments`, "
            "rename or remove the field"
        )
    unread |= {f"field {field} of tool calls" for field in fields.left}
    return {
        **({} if identity is None else {"id": text_of(fields.values, identity, where)}),
        "type": "function",
        "function": {
            "name": text_of(fields.values, name, where),
            "arguments": _arguments(fields.values, arguments, where),
        },
    }


def _flattened(call: Any, where: str) -> dict[str, Any]:
    """A call as one object: OpenAI keeps name and arguments in an object `function` of their own."""
    if not isinstance(call, dict):
        return {}
    function = as_object(call.get("function"))
    if not isinstance(function, dict):
        return call
    around = {name: value for name, value in call.items() if name != "function"}
    inside = {name: value for name, value in function.items() if not (name in around and is_empty(value))}
    for name in around.keys() & inside.keys():
        if not is_empty(around[name]) and parsed(around[name]) != parsed(inside[name]):
            raise UserError(f"{where}: field `{name}` differs inside and outside of `function`; keep one of the two")
    return {**around, **inside}


def _is_missing(arguments: Any) -> bool:
    """Whether arguments say nothing, other than an object which says that there are none."""
    return is_empty(arguments) and parsed(arguments) != {}


def _arguments(call: Mapping[str, Any], name: str | None, where: str) -> dict[str, Any]:
    if name is None or is_empty(call[name]):
        return {}
    arguments = as_object(call[name])
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: `{name}` is {kind_of(arguments)}; expected an object, or one as JSON text")
    return as_json(arguments, name, where)


def read_tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The tools in a record or a turn; None if it has none.

    A field that is only another name for `tools` may mean something else, and is left unless it holds tools. Raises
    UserError for fields that differ.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in fields.spelt("tools"):
        if is_blank(fields.values[name]):
            fields.remove(name)
            continue
        tools = parsed(fields.values[name])
        tools = [as_object(tool) for tool in tools] if isinstance(tools, list) else tools
        if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
            if name == "tools" or all({"name", "function"} & {*tool} for tool in tools):
                found[name] = [_in_function(tool) for tool in as_json(tools, name, fields.where)]
                fields.remove(name)
        elif name == "tools":
            raise UserError(f"{fields.where}: field `tools` is {kind_of(tools)}; expected a list of JSON schemas")
    names = [*found]
    for other in names[1:]:
        if found[other] != found[names[0]]:
            raise UserError(f"{fields.where}: fields `{names[0]}` and `{other}` differ; keep the one that is meant")
    return found[names[0]] if names else None


def _in_function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI and chat templates write it; others write what it is without an object `function` around it."""
    if "function" in tool:
        function = as_object(tool["function"])
        if not isinstance(function, dict):
            return tool
        return {"type": "function", **tool, "function": _with_parameters(function)}
    if not isinstance(tool.get("name"), str):
        return tool
    function = {name: part for name, part in tool.items() if (name, part) != ("type", "function")}
    return {"type": "function", "function": _with_parameters(function)}


def _with_parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The function with its arguments' JSON schema as an object, under the name that templates use."""
    schema = next((name for name in _SCHEMA if name in function), None)
    if schema is None:
        return function
    return {
        "parameters" if name == schema else name: as_object(part) if name == schema and part else part
        for name, part in function.items()
    }


def in_order_of_calls(messages: list[Message], places: list[str]) -> list[Message]:
    """The turns, with the results of parallel calls in the order of the calls; templates may write no ids.

    places: where each turn is. Raises UserError for a result whose id no call before it has, if calls have ids.
    """
    if all(message["role"] != "tool" for message in messages):
        return messages  # most conversations are like this; it saves time
    _check_ids(messages, places)
    ordered: list[Message] = []
    calls: list[dict[str, Any]] = []
    for are_results, group in groupby(messages, key=lambda message: message["role"] == "tool"):
        turns = [*group]
        if are_results:
            ordered += _in_order(turns, calls)
            continue
        callers = [*takewhile(lambda message: message.get("tool_calls"), reversed(turns))]
        calls = [call for message in reversed(callers) for call in message["tool_calls"]]
        ordered += turns
    return ordered


def _check_ids(messages: list[Message], places: list[str]) -> None:
    made = [[call["id"] for call in message.get("tool_calls") or () if "id" in call] for message in messages]
    if not any(made):
        return
    known: set[str] = set()
    for message, ids, where in zip(messages, made, places, strict=True):
        known.update(ids)
        identity = message.get("tool_call_id")
        if message["role"] == "tool" and identity and identity not in known:
            raise UserError(
                f"{where}: `tool_call_id` is {identity!r}, but no call before it has this `id`; correct the id"
            )


def _in_order(results: list[Message], calls: list[dict[str, Any]]) -> list[Message]:
    """The results of these calls in their order: by id, else by name. One that neither identifies takes a place that is
    left. As given if one is of another call."""
    ids = {call["id"] for call in calls if "id" in call}
    by_id = _unique_places([call.get("id") for call in calls])
    by_name = _unique_places([call["function"]["name"] for call in calls])
    order: list[int | None] = []
    for result in results:
        identity = result.get("tool_call_id") if ids else None
        if identity and identity not in ids:
            return results
        order.append(by_id.get(identity) if identity else by_name.get(result.get("name")))
    left = iter(sorted({*range(len(calls))}.difference(order)))
    places = [next(left, len(calls)) if place is None else place for place in order]
    return [results[index] for index in sorted(range(len(results)), key=places.__getitem__)]


def _unique_places(values: list[Any]) -> dict[Any, int]:
    """The index of each value that occurs once."""
    counts = Counter(values)
    return {value: index for index, value in enumerate(values) if counts[value] == 1}
