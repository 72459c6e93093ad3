"""The fields of an object in a record, by meaning: data sets spell the same field in many ways."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.user_error import UserError
from data_prep.values import is_blank, is_empty, parsed

TOOLS = (
    "tools", "functions", "tool_defs", "function_defs", "tool_definitions", "function_definitions", "tool_schemas",
    "function_schemas", "tool_specs", "tool_list", "function_list", "available_tools", "available_functions",
    "tools_json", "tools_list", "functions_list", "tool_schema", "tools_schema", "function_schema", "functions_schema",
    "tool_specifications", "tool_descriptions", "function_descriptions", "toolset", "mcp_tools", "apis", "api_list",
)  # fmt: skip

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@functools.lru_cache(4096)
def folded(name: str) -> str:
    """The letters and digits of a name in lower case: tool_calls, toolCalls and Tool-Calls are one spelling."""
    return "".join(filter(str.isalnum, name.lower()))


class Spellings:
    """What the fields of one kind of object mean, in whatever spelling. Given as spellings by meaning."""

    def __init__(self, spellings: Mapping[str, Sequence[str]]) -> None:
        self._meanings = {folded(name): meaning for meaning, names in spellings.items() for name in names}
        self.names_by_meaning = functools.lru_cache(1024)(self._names_by_meaning)  # most objects have the same fields

    def meaning(self, name: str) -> str | None:
        """What a field of this name means, if it is known."""
        return self._meanings.get(folded(name))

    def _names_by_meaning(self, names: tuple[str, ...]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            if (meaning := self.meaning(name)) is not None:
                found.setdefault(meaning, []).append(name)
        return found


def refuse_media(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a record or a turn with images, video or audio; blank fields for them hold none."""
    if field := next((field for field in _MEDIA if record.get(field) and not is_blank(record[field])), None):
        raise UserError(f"{where}: has `{field}` beside its text; expected text only, remove the field or the record")


class Fields:
    """The fields of one object. What is never taken is left, so that it can be refused or listed."""

    def __init__(self, values: Mapping[str, Any], spellings: Spellings, where: str) -> None:
        self.values = values
        self.where = where
        self._names = spellings.names_by_meaning(tuple(values))
        self._taken: set[str] = set()

    def spelt(self, meaning: str) -> list[str]:
        """Names of the fields that mean this and are not taken, without nulls."""
        names = self._names.get(meaning)
        if names is None:
            return []
        return [name for name in names if name not in self._taken and self.values[name] is not None]

    def take(self, meaning: str) -> str | None:
        """The name of the field that means this; of several, one that is not empty. None if there is none.

        Raises UserError for two that differ.
        """
        names = self.spelt(meaning)
        if not names:
            return None
        said = [name for name in names if not is_empty(self.values[name])]
        for other in said[1:]:
            if parsed(self.values[other]) != parsed(self.values[said[0]]):
                raise UserError(f"{self.where}: fields `{said[0]}` and `{other}` differ; keep the one that is meant")
        self.remove(*names)
        return [*said, *names][0]

    def remove(self, *names: str) -> None:
        """Counts these as read."""
        self._taken.update(names)

    @property
    def left(self) -> list[str]:
        """Names of the fields that say something and were not taken."""
        return [name for name, value in self.values.items() if name not in self._taken and not is_empty(value)]
