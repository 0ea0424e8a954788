"""YAML text -> plain values that know where they were written.

The YAML is composed (never constructed) and then turned into dicts, lists and scalars here, so that no tag can build
an object, every key has a position, a duplicate key is an error, and aliases cannot blow up ("billion laughs") or loop.
YAML 1.2 rules apply: `no` is a string, `2e-4` a number.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from recipes.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # after aliases are expanded; the largest real recipe has a few hundred
MAX_DEPTH = 40
MAX_PLACE = 200  # characters of a file's name in an error

KeyPath = tuple[str | int, ...]


@dataclass
class Tree:
    """A YAML document: `value` as plain data, `places` from key path to `file:line:column`."""

    value: Any
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """The position of a key path, or of its nearest ancestor that was written somewhere."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")


def read_yaml(path: Path) -> Tree:
    """Read a YAML file.

    Raises:
        RecipeError: missing, unreadable, not UTF-8, empty, not YAML, a duplicate key, a tag, or too many aliases.
    """
    place = str(path)
    try:
        try:
            status = path.stat()
        except ValueError:
            remedy = "correct the name"
            raise RecipeError("holds a NUL character, which no file name can", repr(place), remedy) from None
        if stat.S_ISDIR(status.st_mode):
            raise RecipeError("this is a folder, not a recipe file", place, "name the .yaml file in it")
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end, nor does /dev/zero
            raise RecipeError("is no regular file", place, "write the recipe into a .yaml file")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)  # files below /proc have no size until they are read
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError("no such recipe file", place, f"looked in {path.absolute().parent}") from None
    except OSError as error:  # also a link that leads to itself, and a name too long
        place = place if len(place) <= MAX_PLACE else f"{place[:MAX_PLACE]}..."
        raise RecipeError(f"cannot be read ({error.strerror})", place, "name a YAML file") from None
    if len(raw) > MAX_BYTES:
        size = max(len(raw), status.st_size)
        raise RecipeError(f"is {size:,} bytes long, too long for a recipe", place, "name the YAML file, not the data")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"is not UTF-8 text (byte {error.start})", place, "name the YAML file, not the data"
        ) from None
    return parse_yaml(text, place)


def parse_yaml(text: str, name: str) -> Tree:
    """Parse YAML text; `name` stands in front of every position. Raises RecipeError as `read_yaml` does."""
    try:
        # C0 control characters make ruamel's reader stop with an error of its own family.
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError(f"is not valid YAML: {error.problem or error.context}", place) from None
    except YAMLError as error:
        raise RecipeError(f"is not valid YAML: {str(error).splitlines()[0]}", name) from None
    except RecursionError:
        raise RecipeError("is nested too deeply", name) from None
    if node is None:
        raise RecipeError("is empty", name, "a recipe needs at least name, model and data")
    return _Builder(name).build(node)


class _Builder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[KeyPath, str] = {}
        self.count = 0

    def build(self, node: Node) -> Tree:
        return Tree(self._value(node, (), ()), self.places)

    def _place(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _value(self, node: Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        self.count += 1
        place = self._place(node)
        self.places.setdefault(path, place)
        if self.count > MAX_NODES:
            raise RecipeError(f"expands to more than {MAX_NODES:,} values", place, "remove the nested aliases")
        if id(node) in above:
            raise RecipeError("an alias contains itself", place, "remove the anchor")
        if len(above) > MAX_DEPTH:
            raise RecipeError("is nested too deeply", place)
        above = (*above, id(node))
        if isinstance(node, MappingNode | SequenceNode) and not str(node.tag).endswith((":map", ":seq")):
            raise _tag_error(node, place)
        if isinstance(node, MappingNode):
            return self._mapping(node, path, above)
        if isinstance(node, SequenceNode):
            return [self._value(child, (*path, i), above) for i, child in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return _scalar(node, place)

    def _mapping(self, node: MappingNode, path: KeyPath, above: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, ScalarNode):
                raise RecipeError("a key must be plain text", place)
            key = _plain(key_node.value, place)
            if key in result:
                raise RecipeError(f"the key '{key}' stands twice in one map", place, "keep one of them")
            if key == "<<":
                raise RecipeError("merge keys (<<) are not supported", place, "use extends, or write the keys out")
            self.places[(*path, key)] = place
            result[key] = self._value(value_node, (*path, key), above)
        return result


def _scalar(node: ScalarNode, place: str) -> Any:
    kind = str(node.tag).rsplit(":", 1)[-1]
    text = node.value
    if kind in {"str", "timestamp"}:
        return _plain(text, place)
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return (
                    int(text.replace("_", ""), 0) if text.lstrip("+-")[:2].lower() in {"0x", "0o", "0b"} else int(text)
                )
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise RecipeError(f"'{text}' is no {kind}", place) from None
    raise _tag_error(node, place)


def _plain(text: str, place: str) -> str:
    """A text that can be printed, stored and given to a system call; escapes ("\\0", "\\ud800") can write others.

    Raises:
        RecipeError: a NUL, or half of a character.
    """
    if "\0" in text:
        raise RecipeError("holds a NUL character", place, 'take "\\0" out')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):x}"
        raise RecipeError(f"holds half of a character ({half})", place, "write the character itself") from None
    return text


def _tag_error(node: Node, place: str) -> RecipeError:
    return RecipeError(f"the tag {node.tag} is not allowed", place, "a recipe holds plain values only")
