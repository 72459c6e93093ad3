"""YAML as recipes are written: no key twice, and numbers that mean the same to everybody.

PyYAML keeps the last value of a key and drops the others silently, takes 5e-2 for text, 010 for 8 and 1:30 for 90.
"""

import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

_SPECIAL_KEYS = {"tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}  # << and =, which have no constructor
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")  # YAML 1.1 wants a point and a sign
_DEEPEST = 40  # PyYAML takes time in the square of the depth, and Python's stack ends
_MOST = 100_000  # values, with those that aliases repeat: nine lines of aliases of aliases are a billion
_NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")
_UNCLEAR = re.compile(r"[-+]?0[\d_]+$|.*:")  # octal to YAML 1.1, decimal to people and YAML 1.2; and base 60


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes 5e-2 and 1e5 for numbers, as YAML 1.2 does, and raises nothing but yaml.YAMLError."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _refusal(f"more than {_DEEPEST} lists and mappings in each other", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's own functions raise many kinds where a text is not of its tag, as in !!int abc and 2026-13-01."""
        try:
            value = super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except ValueError as error:
            raise _refusal(str(error).partition(";")[0], node.start_mark) from error
        except Exception as error:
            raise _refusal(f"this is no {node.tag.rpartition(':')[2]}", node.start_mark) from error
        if isinstance(value, str) and _NO_TEXT.search(value):
            raise _refusal("text with a zero or half a character, which no file can hold", node.start_mark)
        return value


def _refusal(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts text which _Loader takes for a number in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


class RepeatedKey(Exception):
    """A mapping has the dotted `key` on the lines `first` and `second`, counted from 1."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"key {key} is given twice, on lines {first} and {second}")
        self.key, self.first, self.second = key, first, second


class UnclearNumber(Exception):
    """The number at the dotted `key`, on `line`, means one thing to YAML and another to many who write it."""

    def __init__(self, key: str, line: int, text: str, value: float) -> None:
        super().__init__(f"{key}: YAML reads {text} as {value}; write the number that you mean, or put text in quotes")
        self.line = line


def load_yaml(text: str, at: str = "") -> Any:
    """What yaml.safe_load returns, with 5e-2 as a number. at: the dotted key that the text is the value of.

    Raises RepeatedKey where safe_load would drop a value, UnclearNumber, and yaml.YAMLError for all other mistakes.
    Keys are checked before merge keys (<<) are expanded, since a mapping may override what it merges.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check(loader, root, at, {})
        return loader.construct_document(root)
    finally:
        loader.dispose()


def dump_yaml(values: Any) -> str:
    """YAML that load_yaml reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _check(loader: yaml.SafeLoader, node: yaml.Node, path: str, sizes: dict[int, int]) -> int:
    """How many values the node stands for, aliases counted each time. sizes: of the nodes so far; 0 while unknown."""
    if id(node) in sizes:  # an alias
        if not sizes[id(node)]:
            raise _refusal("an alias of what it is in", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (_INT, _FLOAT) and _UNCLEAR.match(node.value):
            raise UnclearNumber(path, node.start_mark.line + 1, node.value, loader.construct_object(node))
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(loader, item, f"{path}[{index}]", sizes) for index, item in enumerate(node.value))
    elif isinstance(node, yaml.MappingNode):
        size += sum(_check(loader, value, here, sizes) for here, value in _entries(loader, node, path))
    if size > _MOST:
        raise _refusal(f"its aliases stand for more than {_MOST} values", node.start_mark)
    sizes[id(node)] = size
    return size


def _entries(loader: yaml.SafeLoader, mapping: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted key, value) of a mapping. Raises RepeatedKey."""
    lines: dict[Any, int] = {}
    for key_node, value in mapping.value:
        key = key_node.value if key_node.tag in _SPECIAL_KEYS else loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            continue  # the constructor refuses it
        here, line = f"{path}.{key}" if path else str(key), key_node.start_mark.line + 1
        if key in lines:
            raise RepeatedKey(here, lines[key], line)
        lines[key] = line
        yield here, value
