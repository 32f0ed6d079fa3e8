"""A YAML file that a pydantic model describes; an error names file, line and key."""

from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mpa.files.records import InputError


class Fault(ValueError):
    """What is wrong with the value of a validator; `at`: the keys and places in lists that lead there from this value."""

    def __init__(self, message: str, *at: str | int):
        super().__init__(message)
        self.at = at


class Section(BaseModel):
    """A mapping in a file. An unknown key is an error that lists the known ones. A text stands for the key `text_is`, if there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text_is: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given):
        if isinstance(given, str) and cls.text_is:
            return {cls.text_is: given}
        if isinstance(given, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in given:
                if key not in known:
                    raise Fault(f"unknown key. Known: {', '.join(known)}", key)
        return given


def read(path: Path, kind: type[Section], hint: str = "") -> Section:
    """The file as a `kind`. Raises InputError, which names the line of the first fault, or says `hint` if there is no file."""
    root = _compose(path, hint)
    try:
        return kind.model_validate(_values(root, path))
    except ValidationError as error:
        at, message = _told(error.errors()[0])
    where = [part for part in at if isinstance(part, str) and part != "[key]"]
    raise InputError(f"{path}, line {_line(root, at)}: {': '.join([*where, message])}.")


def _compose(path: Path, hint: str) -> yaml.Node:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {hint}".rstrip()) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}.") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise InputError(f"{path}, line {line}: not YAML: {getattr(error, 'problem', error)}.") from None
    if root is None:
        raise InputError(f"{path}: the file is empty.")
    return root


def _values(node: yaml.Node, path: Path):
    """What a node holds: its scalars as they are written (1e-5 stays "1e-5"), or None. Raises InputError for a repeated key."""
    if isinstance(node, yaml.SequenceNode):
        return [_values(item, path) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value.strip()
    found = {}
    for key, value in node.value:
        name = str(key.value)
        if name in found:
            raise InputError(f"{path}, line {key.start_mark.line + 1}: the key {name!r} is repeated.")
        found[name] = _values(value, path)
    return found


def _told(error: dict) -> tuple[tuple, str]:
    """(where it is, what is wrong) of one of pydantic's errors."""
    at, cause = error["loc"], error.get("ctx", {}).get("error")
    if cause:  # of a validator of ours
        return (*at, *getattr(cause, "at", ())), str(cause).removesuffix(".")
    if error["type"] == "missing":
        return at[:-1], f"the key {at[-1]!r} is missing"
    if error["type"] in ("model_type", "dict_type"):
        return at, "should be a mapping, KEY: VALUE"
    given = f", not {error['input']!r}" if isinstance(error["input"], str) else ""
    return at, error["msg"].removeprefix("Input ") + given


def _line(node: yaml.Node, at: tuple) -> int:
    """The line, from 1, of the key or item that `at` leads to, as far as it is in the file."""
    mark = node.start_mark
    for part in at:
        inside = node.value if isinstance(node, yaml.MappingNode) else []
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            inside = [(node.value[part], node.value[part])]
        for key, value in inside:
            if key is value or key.value == part:
                mark, node = key.start_mark, value
                break
    return mark.line + 1
