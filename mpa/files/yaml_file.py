"""A YAML file whose values know their lines, so that an error names file and line."""

import re
from pathlib import Path

from mpa.files.records import InputError


class YamlFile:
    """The nodes of a YAML file, and checks that turn them into values.

    Each check raises InputError, which names file and line. `hint` is said if there is no file.
    """

    def __init__(self, path: Path, hint: str = ""):
        import yaml

        self.path, self.yaml = path, yaml
        try:
            self.root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file. {hint}".rstrip()) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}.") from None
        except yaml.YAMLError as error:
            line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
            raise InputError(f"{path}, line {line}: not YAML: {getattr(error, 'problem', error)}.") from None
        if self.root is None:
            raise InputError(f"{path}: the file is empty.")

    def error(self, node, message: str) -> InputError:
        return InputError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def mapping(self, node, known, what: str) -> dict:
        """{key: node}. Raises InputError for an unknown or repeated key; `known` is None if any key will do."""
        if not isinstance(node, self.yaml.MappingNode):
            raise self.error(node, f"{what} should be a mapping, KEY: VALUE.")
        found = {}
        for key, value in node.value:
            name = self.text(key, f"a key of {what}")
            if known is not None and name not in known:
                raise self.error(key, f"unknown key {name!r} in {what}. Known: {', '.join(known)}.")
            if name in found:
                raise self.error(key, f"the key {name!r} is repeated.")
            found[name] = value
        return found

    def items(self, node, what: str) -> list:
        """The nodes of a list, or of a single value."""
        if isinstance(node, self.yaml.SequenceNode):
            if not node.value:
                raise self.error(node, f"{what}: the list is empty.")
            return node.value
        return [node]

    def text(self, node, what: str) -> str:
        if not isinstance(node, self.yaml.ScalarNode) or not node.value.strip():
            raise self.error(node, f"{what} should be a single value.")
        return node.value.strip()

    def choice(self, node, known, what: str) -> str:
        if (value := self.text(node, what)) not in known:
            raise self.error(node, f"unknown {what} {value!r}. Known: {', '.join(known)}.")
        return value

    def number(self, node, what: str, least: int) -> int:
        value = self.text(node, what)
        if not re.fullmatch(r"-?\d+", value) or int(value) < least:
            raise self.error(node, f"{what} should be a whole number from {least}: {value!r}.")
        return int(value)

    def distinct(self, node, what: str, read) -> list:
        found = []
        for item in self.items(node, what):
            value = read(item)
            if value in found:
                raise self.error(item, f"{what}: {value} is repeated.")
            found.append(value)
        return found

    def is_empty(self, node) -> bool:
        return node.tag == "tag:yaml.org,2002:null"
