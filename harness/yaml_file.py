"""Reading one YAML file safely, and finding the line of a field in it.

Refused with their line: files over 256 KiB, duplicate keys, anchors and aliases (a few of them can unfold to
gigabytes), tags, more than one document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LIMIT_BYTES = 256 * 1024


class Problem(NamedTuple):
    """One thing wrong with a file. `line` counts from 1; `field` is a dotted path, empty for the whole file."""

    file: str
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


class SuiteError(ValueError):
    """A suite that cannot be used, with every problem found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True)
class Document:
    """A parsed file: its value as plain lists and dicts, and the nodes that know their lines."""

    path: str
    value: Any
    node: yaml.Node

    def problem(self, location: Sequence[str | int], message: str) -> Problem:
        """A problem at `location` (keys and indices). The index of a value that was written without a list is left
        out; any other step that is not in the file ends the walk at the last line that is."""
        node, line, field = self.node, self.node.start_mark.line, ""
        for step in location:
            if isinstance(step, int) and not isinstance(node, yaml.SequenceNode):
                continue
            found = _child(node, step)
            if found is None:
                break
            node, line = found
            field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else str(step)
        return Problem(self.path, line + 1, field, message)


def read(path: Path) -> Document:
    """Parse `path`. Raises SuiteError."""
    shown = str(path)
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise SuiteError([Problem(shown, None, "", f"is larger than {LIMIT_BYTES // 1024} KiB")])
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError([Problem(shown, None, "", f"cannot be read: {error}")]) from None
    try:
        _refuse_aliases(shown, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise SuiteError([Problem(shown, 1, "", "is empty; it needs schema, name, description and groups")])
        _refuse_duplicates(shown, node)
        return Document(shown, yaml.safe_load(text), node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise SuiteError([Problem(shown, line, "", f"is not valid YAML: {error.problem}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SuiteError):
            raise
        raise SuiteError([Problem(shown, None, "", f"is not valid YAML: {error}")]) from None


def _refuse_aliases(path: str, text: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if getattr(event, "anchor", None):
            message = "anchors and aliases are not allowed; write the value out, or use 'defaults'"
            raise SuiteError([Problem(path, event.start_mark.line + 1, "", message)])


def _refuse_duplicates(path: str, root: yaml.Node) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, yaml.SequenceNode):
            stack += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if str(key.value) in seen:
                    message = f"key '{key.value}' was already given on line {seen[key.value]}"
                    raise SuiteError([Problem(path, line, "", message)])
                seen[str(key.value)] = line
                stack.append(value)


def _child(node: yaml.Node, step: str | int) -> tuple[yaml.Node, int] | None:
    """The node one step down and its line: of the key in a mapping, of the entry in a list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return value, key.start_mark.line
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line
    return None
