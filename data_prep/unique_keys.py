"""YAML without repeated keys: PyYAML keeps the last value of a key and drops the others silently."""

from collections.abc import Hashable
from typing import Any

import yaml

_SPECIAL_KEYS = {"tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}  # << and =, which have no constructor


class RepeatedKey(Exception):
    """A mapping has the dotted `key` on the lines `first` and `second`, counted from 1."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"key {key} is given twice, on lines {first} and {second}")
        self.key, self.first, self.second = key, first, second


def load_yaml(text: str, at: str = "") -> Any:
    """What yaml.safe_load returns. at: the dotted key that the text is the value of.

    Raises RepeatedKey where safe_load would drop a value, and yaml.YAMLError and ValueError as it does. Keys are
    checked before merge keys (<<) are expanded, since a mapping may override what it merges.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check(loader, root, at, set())
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check(loader: yaml.SafeLoader, node: yaml.Node, path: str, checked: set[int]) -> None:
    if id(node) in checked:  # an alias, of a parent even
        return
    checked.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check(loader, item, f"{path}[{index}]", checked)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key_node, value in node.value:
            key = key_node.value if key_node.tag in _SPECIAL_KEYS else loader.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the constructor refuses it
            here, line = f"{path}.{key}" if path else str(key), key_node.start_mark.line + 1
            if key in lines:
                raise RepeatedKey(here, lines[key], line)
            lines[key] = line
            _check(loader, value, here, checked)
