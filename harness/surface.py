"""`python -m harness surface WHEEL_OR_DIR`: what the plugin hooks, compared with another vLLM by its source alone.

Nothing is installed or imported: classes, functions and parameter names are read from the syntax tree, through base
classes and re-exports.
"""

import argparse
import ast
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from helix_runtime.vllm_plugin.architectures import GQA
from helix_runtime.vllm_plugin.compat import LATER, SURFACE, Surface

#: Everything that the plugin hooks.
HOOKED = (*SURFACE, *LATER, *GQA.values())
USAGE = 2
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEEPEST = 20  # base classes and re-exports that are followed


class NoSource(ValueError):
    """No vLLM source there; the text says what was looked for."""


class Finding(NamedTuple):
    """One row of the surface. `problem`: "" where it is as the plugin needs it; `moved`: modules that now define it."""

    row: Surface
    problem: str
    moved: tuple[str, ...] = ()


class Tree:
    """The sources of one vLLM, by module name."""

    def __init__(self, files: dict[str, str], version: str):
        self.files = files
        self.version = version

    @classmethod
    def read(cls, path: Path) -> "Tree":
        """A wheel, a folder that holds `vllm/`, or that folder itself. NoSource for anything else."""
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
                files = {name: wheel.read(name).decode(errors="replace") for name in names}
        else:
            root = path / "vllm" if (path / "vllm").is_dir() else path
            found = sorted(root.rglob("*.py")) if (root / "engine" / "arg_utils.py").is_file() else []
            files = {f"vllm/{file.relative_to(root).as_posix()}": file.read_text(errors="replace") for file in found}
        if "vllm/engine/arg_utils.py" not in files:
            raise NoSource(f"{path} is no vLLM: no vllm/engine/arg_utils.py in it; give a wheel or an unpacked folder")
        return cls(files, _version(files, path))

    @cache  # noqa: B019 - one tree a call of the command
    def module(self, name: str) -> ast.Module | None:
        base = name.replace(".", "/")
        text = self.files.get(f"{base}.py") or self.files.get(f"{base}/__init__.py")
        return None if text is None else ast.parse(text)

    def find(self, module: str, qualified: str, depth: int = 0) -> ast.AST | None:
        """The definition of `qualified` as `module` knows it; None where it has none."""
        tree = self.module(module)
        if tree is None or depth > _DEEPEST:
            return None
        first, _, rest = qualified.partition(".")
        node = next((one for one in reversed(list(_definitions(tree))) if one.name == first), None)
        if node is None:
            for origin, name in _imports(tree, module, self._is_package(module), first):
                if found := self.find(origin, f"{name}.{rest}" if rest else name, depth + 1):
                    return found
            return None
        if not rest:
            return node
        if not isinstance(node, ast.ClassDef):
            return None
        member = next((one for one in reversed(list(_definitions(node))) if one.name == rest), None)
        if member is not None:
            return member
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            if isinstance(base, ast.Name) and (found := self.find(module, f"{base.id}.{rest}", depth + 1)):
                return found
        return None

    def defining(self, name: str) -> tuple[str, ...]:
        """Modules that define a class or function called `name` at their top."""
        there = [file for file, text in self.files.items() if f"class {name}" in text or f"def {name}" in text]
        modules = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in there]
        return tuple(one for one in modules if any(node.name == name for node in _definitions(self.module(one))))

    def _is_package(self, module: str) -> bool:
        return f"{module.replace('.', '/')}/__init__.py" in self.files


def compare(tree: Tree, surface: Sequence[Surface] = HOOKED) -> list[Finding]:
    """Every row of `surface` against `tree`."""
    return [_finding(tree, row) for row in surface]


def _finding(tree: Tree, row: Surface) -> Finding:
    module, _, qualified = row.target.partition(":")
    found = tree.find(module, qualified)
    if not isinstance(found, _FUNCTIONS):
        first = qualified.partition(".")[0]
        where = tuple(one for one in tree.defining(first) if one != module)
        gone = "the module is gone" if tree.module(module) is None else "it is gone"
        return Finding(row, gone, where)
    takes = parameters(found)
    if takes == row.parameters:
        return Finding(row, "")
    new = [name for name in takes if name not in row.parameters]
    old = [name for name in row.parameters if name not in takes]
    told = [f"new: {', '.join(new)}" if new else "", f"gone: {', '.join(old)}" if old else ""]
    return Finding(row, "; ".join(part for part in told if part) or f"another order: {', '.join(takes)}")


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Names in the order of the signature, without the `cls` of a classmethod."""
    given = node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args)]
    names += [given.vararg.arg] if given.vararg else []
    names += [one.arg for one in given.kwonlyargs]
    names += [given.kwarg.arg] if given.kwarg else []
    return tuple(names[1:] if names[:1] == ["cls"] else names)


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions in the body of a module or class, those under `if` and `try` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *_FUNCTIONS)):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _definitions(child)


def _imports(tree: ast.Module, module: str, package: bool, wanted: str) -> Iterator[tuple[str, str]]:
    """(module, name) from which `module` imports `wanted`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        origin = node.module or ""
        if node.level:
            parts = module.split(".")
            kept = parts[: len(parts) - node.level + package]
            origin = ".".join([*kept, *([node.module] if node.module else [])])
        for name in node.names:
            if (name.asname or name.name) == wanted and origin.startswith("vllm"):
                yield origin, name.name


def _version(files: dict[str, str], path: Path) -> str:
    """From `_version.py`, else from the wheel's name."""
    for node in ast.walk(ast.parse(files.get("vllm/_version.py", ""))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if names & {"version", "__version__"}:
                return node.value.value
    return path.name.split("-")[1] if path.suffix == ".whl" and path.name.count("-") >= 4 else "of unknown version"


def main(argv: Sequence[str]) -> int:
    """Exit status 0: as the plugin needs it; 1: something changed; 2: no vLLM there."""
    parser = argparse.ArgumentParser(prog="python -m harness surface", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="WHEEL_OR_DIR", help="another vLLM: a wheel, or an unpacked folder")
    options = parser.parse_args(argv)
    try:
        tree = Tree.read(options.path)
    except (NoSource, OSError) as problem:
        print(f"surface: error: {problem}", file=sys.stderr)
        return USAGE
    findings = compare(tree)
    changed = [one for one in findings if one.problem]
    for one in changed:
        print(f"✗ {one.row.target}  ({one.row.use}, {one.row.platform})\n    {one.problem}")
        if one.moved:
            print(f"    defined in: {', '.join(one.moved[:5])}")
    same = len(findings) - len(changed)
    print(f"vLLM {tree.version}: {same} of {len(findings)} hooked callables are as the plugin needs them")
    return 1 if changed else 0
