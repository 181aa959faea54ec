"""The coupling surface against sources: the installed vLLM, and small made-up ones that changed."""

import ast
import importlib.util
import zipfile
from pathlib import Path

import pytest

from harness import cli
from harness.suite import ROOT
from harness.surface import HOOKED, NoSource, Tree, compare
from helix_runtime.vllm_plugin.compat import Surface

DOOR = {"engine/arg_utils.py": "class EngineArgs:\n    pass\n", "_version.py": '__version__ = version = "9.9.9"\n'}
RUN = Surface("vllm.a:Worker.run", ("self", "x", "y"), "test")


def vllm(folder: Path, **files: str) -> Path:
    for name, text in {**DOOR, **{f"{name.replace('__', '/')}.py": text for name, text in files.items()}}.items():
        (folder / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "vllm" / name).write_text(text)
    return folder


def problem(folder: Path, row: Surface = RUN, **files: str) -> str:
    (found,) = compare(Tree.read(vllm(folder, **files)), [row])
    return found.problem


def test_the_supported_vllm_is_as_the_plugin_needs_it(capsys):
    installed = importlib.util.find_spec("vllm").submodule_search_locations[0]
    assert cli.main(["surface", installed]) == 0
    assert f"{len(HOOKED)} of {len(HOOKED)} hooked callables" in capsys.readouterr().out


def test_every_callable_that_a_hook_replaces_is_in_the_list():
    """`patch("module:name", …)` in the plugin, the module's name written out or a constant of the file."""
    listed = {row.target for row in HOOKED}
    found, elsewhere = set(), []
    for path in sorted((ROOT / "helix_runtime" / "vllm_plugin").glob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            name.id: node.value.value
            for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for name in node.targets
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "patch":
                text = ast.unparse(node.args[0])
                try:
                    found.add(eval(text, {}, constants))  # our own source
                except NameError:
                    elsewhere.append((path.name, text))
    assert found - listed == set() and len(found) > 20
    # one name in several modules, and the constructors of the models, which are rows of the list themselves
    assert elsewhere == [
        ("exchange.py", "f'{module}:dcp_a2a_lse_reduce'"),
        ("tpa_scope.py", "constructor.target"),
    ]  # fmt: skip
    assert {f"vllm.v1.attention.{module}:dcp_a2a_lse_reduce" for module in ("ops.dcp", "backends.flash_attn")} <= listed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Worker:\n    def run(self, x, y): ...\n", ""),
        ("class Worker:\n    @classmethod\n    def run(cls, self, x, *, y=1): ...\n", ""),
        ("class Worker:\n    def run(self, x, z, y): ...\n", "new: z"),
        ("class Worker:\n    def run(self, x): ...\n", "gone: y"),
        ("class Worker:\n    def run(self, x, *args): ...\n", "new: args; gone: y"),
        ("class Worker:\n    def run(self, y, x): ...\n", "another order: self, y, x"),
        ("class Worker:\n    def walk(self): ...\n", "it is gone"),
        ("class Base:\n    def run(self, x, y): ...\nclass Worker(Base):\n    pass\n", ""),
        ("if True:\n    class Worker:\n        def run(self, x, y): ...\nelse:\n    Worker = None\n", ""),
    ],
)
def test_what_changed_is_said(tmp_path, text, says):
    assert problem(tmp_path, a=text) == says


def test_base_classes_and_re_exports_are_followed_through_modules(tmp_path):
    base = "from typing import Generic\nclass Base(Generic):\n    def run(self, x, y): ...\n"
    files = {"a": "from .b import Worker\n", "b": "from vllm.c import Base as B\nclass Worker(B): ...\n", "c": base}
    assert problem(tmp_path, **files) == ""


def test_a_class_that_moved_is_found_again(tmp_path):
    folder = vllm(tmp_path, new__place="class Worker:\n    def run(self, x, y): ...\n")
    (found,) = compare(Tree.read(folder), [RUN])
    assert found.problem == "the module is gone" and found.moved == ("vllm.new.place",)


def test_a_wheel_is_read_without_unpacking(tmp_path, capsys):
    vllm(tmp_path, a="")
    wheel = tmp_path / "vllm-9.9.9-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for file in (tmp_path / "vllm").rglob("*.py"):
            packed.write(file, file.relative_to(tmp_path))
    assert cli.main(["surface", str(wheel)]) == 1
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == f"vLLM 9.9.9: 0 of {len(HOOKED)} hooked callables are as the plugin needs them"
    assert "✗ vllm.engine.arg_utils:EngineArgs.add_cli_args  (flag, any)\n    it is gone" in told


def test_what_is_no_vllm_is_refused(tmp_path):
    with pytest.raises(NoSource, match="give a wheel"):
        Tree.read(tmp_path)
    assert cli.main(["surface", str(tmp_path / "absent.whl")]) == 2
