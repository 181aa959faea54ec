"""A suite file (`suites/*.yaml`): groups of cells as crossed axes. Strict: what is not known here is refused.

Errors name file, line and field, and list the allowed values; `harness.yaml_file` finds the lines.
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic import model_validator as validator

from harness.bench.spec import BenchSpec, Goodput, Load
from harness.cell import Comm, Mode
from harness.frozen import Frozen
from harness.verdict import DECLARABLE, Verdict
from harness.yaml_file import Document, Problem, SuiteError, read
from helix_runtime.capability_rows import DEFAULT_VLLM

#: Where this checkout is: suites, schemas and reports are found from here, wherever the command is called.
ROOT = Path(__file__).resolve().parent.parent
#: An installed distribution has none: it brings its suites along, and its reports are where the command is called.
CHECKOUT = (ROOT / "pyproject.toml").is_file()
FOLDER = ROOT / "suites" if CHECKOUT else ROOT / "harness" / "suites"
REPORTS = (ROOT if CHECKOUT else Path.cwd()) / "reports"
SCHEMA_FILE = ROOT / "harness" / "schemas" / "suite-v1.json"

#: Serve options that a cell has a field of its own for, or that the harness sets itself.
RESERVED = {
    "tensor-parallel-size": "layout",
    "decode-context-parallel-size": "layout",
    "attention-backend": "backend",
    "cp-kv-cache-interleave-size": "interleave",
    "dcp-comm-backend": "comm",
    "helix-mode": "mode",
    "additional-config": "helix",
    "model": "model",
    "logits-processors": "",
    "host": None,
    "port": None,
    "uds": None,
    "served-model-name": None,
    "api-key": None,
    "config": None,
}
#: … and all whose names begin so.
RESERVED_PREFIXES = ("ssl-",)
#: Runs a model's own code; shown wherever a suite gives it, so it has one spelling.
TRUST = "trust-remote-code"


#: A recipe, or OWNER/NAME on the hub: never a path, so neither part begins with a dot.
MODEL = r"^(recipe:[a-z0-9-]+|[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*)$"


class _OneOrMany:
    """JSON Schema of an axis: one value, or a list of values."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else (value,)


def _plain_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _not_reserved(options: dict[str, object]) -> dict[str, object]:
    for name in options:
        usual = option_name(name)
        if usual != name:
            raise ValueError(f"'{name}' is written '{usual}': vLLM takes both, and a cell has one name")
        if full := next((word for word in (*RESERVED, TRUST) if word.startswith(name) and word != name), None):
            raise ValueError(f"'{name}' is no option in full, and vLLM would read it as '{full}'")
        if name in RESERVED or name.startswith(RESERVED_PREFIXES):
            instead = RESERVED.get(name)
            raise ValueError(
                f"'{name}' cannot be set here; " + (f"use '{instead}'" if instead else "the harness sets it")
            )
    return options


def option_name(name: str) -> str:
    """An option's name as vLLM reads it: `_` is `-`, but not in the keys of a dotted one (`a_b.c_d` is `a-b.c_d`)."""
    head, dot, rest = name.partition(".")
    return head.replace("_", "-") + dot + rest


def _declarable(verdict: Verdict | None) -> Verdict | None:
    if verdict is not None and verdict not in DECLARABLE:
        raise ValueError(f"a suite may declare {', '.join(DECLARABLE)}")
    return verdict


T = TypeVar("T")
#: One value or a list of values; a list is an axis that is crossed with the others.
Axis = Annotated[tuple[T, ...], BeforeValidator(_listed), Field(min_length=1), _OneOrMany()]
#: `null` leaves the option out, `true` gives a bare flag, `false` its `--no-` form.
Option = str | int | float | bool | None
OptionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Options = dict[OptionName, Axis[Option]]
Served = Annotated[Options, AfterValidator(_not_reserved)]
Family = Literal["cpu", "ampere", "ada", "hopper", "blackwell", "blackwell-rtx"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=60)]
Size = Annotated[int, Field(ge=1, le=1024)]
Sentence = Annotated[str, Field(min_length=1, max_length=500)]


class Strict(Frozen):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LayoutSpec(Strict):
    """One parallel layout: TP, and DCP (= KVP; 1 unless told). Illegal ones are welcome: they are refusals to test."""

    tp: Size
    dcp: Size = 1


class Group(Strict):
    """Cells that share everything but their axes. Every list is an axis; the group is the product of its axes."""

    name: Name
    mode: Annotated[Mode, Field(strict=False)]
    backend: Axis[Annotated[str, Field(pattern=r"^(auto|[A-Z][A-Z0-9_]*)$")]]
    hardware: Axis[Family]
    model: Axis[Annotated[str, Field(pattern=MODEL)]]
    layout: Axis[LayoutSpec]
    interleave: Axis[Size] = (1,)
    comm: Axis[Comm | None] = (None,)
    serve: Served = Field(default_factory=dict)
    helix: Options = Field(default_factory=dict)
    workload: Literal["smoke", "standard"] = "standard"
    bench: BenchSpec | None = Field(default=None, description="measure the cells against their baselines under load")
    vllm_version: Axis[Annotated[str, Field(pattern=r"^([0-9]+\.[0-9]+\.[0-9]+|nightly)$")]] = (DEFAULT_VLLM,)
    fault: Axis[Annotated[str, Field(pattern=r"^[a-z0-9-]+(:[a-z]+(=[0-9]+)?(,[a-z]+(=[0-9]+)?)*)?$")] | None] = (None,)
    expect: Annotated[Verdict | None, Field(strict=False), AfterValidator(_declarable)] = None
    why: Sentence | None = None
    refusal: Sentence | None = Field(default=None, description="text that the refusal must contain")

    @validator(mode="after")
    def _consistent(self) -> "Group":
        if self.expect not in (None, Verdict.PASS) and not self.why:
            raise ValueError(f"'expect: {self.expect}' needs a 'why'")
        if self.refusal and self.expect not in (None, Verdict.REJECTED):
            raise ValueError(f"'refusal' goes with 'expect: rejected', not with '{self.expect}'")
        if any(self.fault) and self.mode is Mode.STANDARD_TP:
            raise ValueError(f"'fault' goes with a context-parallel mode, not with '{self.mode}'")
        if any(self.fault) and self.expect is Verdict.PASS and not self.why:
            raise ValueError("a fault that cannot be caught ('expect: pass') needs a 'why'")
        if self.bench and self.mode is Mode.STANDARD_TP:
            raise ValueError("'bench' measures a cell against its standard-TP baseline, so not 'standard-tp' itself")
        if set(self.vllm_version) != {DEFAULT_VLLM} and self.mode.helix:
            raise ValueError(f"'vllm_version' goes with a standard mode: the plugin runs on {DEFAULT_VLLM} only")
        if self.helix and not self.mode.helix:
            raise ValueError(f"'helix' options go with a helix mode, not with '{self.mode}'")
        return self


class Suite(Strict):
    """One suite file. `defaults` are serve options of every cell on that hardware; a group's own come on top."""

    model_config = ConfigDict(title="Helix suite, version 1")

    schema_version: Literal[1] = Field(alias="schema")
    name: Name
    description: Sentence
    nightly: bool = Field(default=False, description="long: left out of --all, run by its name only")
    defaults: dict[Family, Served] = Field(default_factory=dict)
    groups: Annotated[tuple[Group, ...], BeforeValidator(_plain_list), Field(min_length=1)]

    @validator(mode="after")
    def _unique_names(self) -> "Suite":
        names = [group.name for group in self.groups]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"group names are used twice: {', '.join(twice)}")
        return self


def load(path: Path) -> Suite:
    """The suite in `path`. Raises SuiteError with every problem found, each with its line."""
    document = read(path)
    try:
        suite = Suite.model_validate(document.value)
    except ValidationError as error:
        problems = [_problem(document, entry) for entry in error.errors()]
        raise SuiteError(list(dict.fromkeys(problems))) from None  # a union reports once for each of its members
    _check_names(suite, document)
    if suite.name != path.stem:
        message = f"is '{suite.name}'; allowed: '{path.stem}', the name of the file"
        raise SuiteError([document.problem(("name",), message)])
    return suite


def available(folder: Path = FOLDER) -> dict[str, Path]:
    """Suite files by name."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_all(names: Iterable[str] = (), folder: Path = FOLDER) -> list[Suite]:
    """The named suites, or all of `folder` that are not nightly. A name may be a path to a `.yaml` file.

    Raises SuiteError for an unknown name, with the names that exist; problems of several files are gathered.
    """
    known, named = available(folder), list(dict.fromkeys(names))
    suites, problems = [], []
    for name in named or known:
        path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
        if path is None:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(Problem("--suite", None, "", f"no suite '{name}'{hint}; allowed: {', '.join(known)}"))
            continue
        try:
            suites.append(load(path))
        except SuiteError as error:
            problems += error.problems
    if problems:
        raise SuiteError(problems)
    return suites if named else [suite for suite in suites if not suite.nightly]


def json_schema() -> dict[str, Any]:
    """JSON Schema of a suite file, for editors; committed as `harness/schemas/suite-v1.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Suite.model_json_schema(by_alias=True)}


def _is_recipe(name: str) -> bool:
    """Whether a recipe is registered, or belongs to a family of them (`llama-retrieve-k3-q12`)."""
    from harness.models.recipe import find

    try:
        find(name)
    except (KeyError, ValueError):
        return False
    return True


def _check_names(suite: Suite, document: Document) -> None:
    """Backends and recipes must exist: a slip of the pen would otherwise be found when the server starts."""
    from harness.models import RECIPES
    from helix_runtime.capabilities import backends
    from helix_runtime.vllm_plugin.options import HelixOptions

    known = {"backend": ("auto", *backends()), "model": tuple(f"recipe:{name}" for name in RECIPES)}
    helix_options = [field.name for field in fields(HelixOptions) if field.name not in ("helix_mode", "proof_dir")]
    exists = {"backend": known["backend"].__contains__, "model": _is_recipe}
    problems = []
    for number, group in enumerate(suite.groups):
        recipes = [(index, name) for index, name in enumerate(group.model) if name.startswith("recipe:")]
        for field, named in (("backend", list(enumerate(group.backend))), ("model", recipes)):
            problems += [
                document.problem(("groups", number, field, index), f"is '{name}'; allowed: {', '.join(known[field])}")
                for index, name in named
                if not exists[field](name)
            ]
        problems += [
            document.problem(("groups", number, "helix", name), f"is no option; allowed: {', '.join(helix_options)}")
            for name in group.helix
            if name not in helix_options
        ]
    if problems:
        raise SuiteError(problems)


def _problem(document: Document, entry: Any) -> Problem:
    """A pydantic error in the reader's words."""
    location, message = entry["loc"], entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        message = f"unknown key '{location[-1]}'; {hint}allowed: {', '.join(allowed)}"
    elif entry["type"] == "missing":
        message = f"'{location[-1]}' is required"
        location = location[:-1]
    elif location and location[-1] in ("str", "int", "float", "bool"):
        message = f"is {entry['input']!r}; allowed: text, a number, true, false or null, or a list of them"
    elif entry["type"] in ("enum", "literal_error"):
        message = f"is {entry['input']!r}; allowed: {entry['ctx']['expected']}"
    elif location and not isinstance(entry["input"], dict | list | tuple):
        message = f"is {entry['input']!r}; {message[0].lower()}{message[1:]}"
    return document.problem(location, message)


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    inner = {"loads": Load, "goodput": Goodput, "bench": BenchSpec, "layout": LayoutSpec, "groups": Group}
    model = next((inner[name] for name in inner if name in location), Suite)
    return [field.alias or name for name, field in model.model_fields.items()]
