"""The fields of an object in a record, by meaning: data sets spell the same field in many ways."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.user_error import UserError
from data_prep.values import is_blank, is_empty, parsed

TOOLS = (
    "tools", "functions", "tool_defs", "function_defs", "tool_definitions", "function_definitions", "tool_schemas",
    "function_schemas", "tool_specs", "tool_list", "function_list", "available_tools", "available_functions",
    "tools_json",
)  # fmt: skip

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@functools.lru_cache(4096)
def folded(name: str) -> str:
    """The letters and digits of a name in lower case: tool_calls, toolCalls and Tool-Calls are one spelling."""
    return "".join(filter(str.isalnum, name.lower()))


def by_spelling(spellings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Meanings by folded spelling, from spellings by meaning."""
    return {folded(name): meaning for meaning, names in spellings.items() for name in names}


def refuse_media(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a record or a turn with images, video or audio; blank fields for them hold none."""
    if field := next((field for field in _MEDIA if record.get(field) and not is_blank(record[field])), None):
        raise UserError(f"{where}: has `{field}` beside its text; expected text only, remove the field or the record")


class Fields:
    """The fields of one object. What is never taken is left, so that it can be refused or listed.

    meanings: by folded spelling.
    """

    def __init__(self, values: Mapping[str, Any], meanings: Mapping[str, str], where: str) -> None:
        self.values = values
        self.where = where
        self._meanings = meanings
        self._left = [name for name, value in values.items() if value is not None]

    def spelt(self, meaning: str) -> list[str]:
        """Names of the fields that mean this and are not taken."""
        return [name for name in self._left if self._meanings.get(folded(name)) == meaning]

    def take(self, meaning: str) -> str | None:
        """The name of the field that means this; of several, one that is not empty. None if there is none.

        Raises UserError for two that differ.
        """
        names = self.spelt(meaning)
        said = [name for name in names if not is_empty(self.values[name])]
        for other in said[1:]:
            if parsed(self.values[other]) != parsed(self.values[said[0]]):
                raise UserError(f"{self.where}: fields `{said[0]}` and `{other}` differ; keep the one that is meant")
        self.remove(*names)
        return next(iter([*said, *names]), None)

    def remove(self, *names: str) -> None:
        """Counts these as read."""
        self._left = [name for name in self._left if name not in names]

    @property
    def left(self) -> list[str]:
        """Names of the fields that say something and were not taken."""
        return [name for name in self._left if not is_empty(self.values[name])]
