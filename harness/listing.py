"""What `--list` and `--dry-run` print: the plan, as text for people or as JSON for programs."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.cell import Cell
from harness.matrix import PlannedCell
from harness.plain import plural
from harness.suite import Suite, available, load_all
from harness.verdict import TABLE

if TYPE_CHECKING:
    from harness.cli import Request


def show_list(request: "Request") -> int:
    """`--list`: suites; with `-v` each cell with its declared verdict and why."""
    plan, suites = request.plan, request.suites
    assumed = [device.family for device in request.hardware if not device.detected]
    if request.options.format == "json":
        document = {
            "hardware": [device.model_dump(mode="json") for device in request.hardware],
            "suites": [_suite_as_json(suite, plan, assumed) for suite in suites],
        }
        if request.options.verbose:
            document["cells"] = [as_json(item) for item in plan]
        print(json.dumps(document, indent=2))
        return 0
    print(f"hardware: {' and '.join(str(device) for device in request.hardware)}\n")
    width = max(len(suite.name) for suite in suites)
    where = ",".join(device.family for device in request.hardware) if assumed else "here"
    print(f"{'suite':<{width}}  cells  {where:>4}  about")
    for suite in suites:
        count = _count(_of(suite, plan), assumed)
        print(f"{suite.name:<{width}}  {count.cells:>5}  {count.able:>{max(4, len(where))}}  {suite.description}")
    count = _count(plan, assumed)
    would = f"{count.able} would run on {where} with as many GPUs as they need, " if assumed else ""
    print(f"\n{plural(len(plan), 'cell')} in all (suites share some), {would}{count.here} can run here.")
    if not request.options.suite:
        by_name = (suite.name for suite in load_all(available()) if suite.nightly)
        print(f"Not part of --all, run by name: {', '.join(by_name)}.")
    if request.options.verbose:
        for item in plan:
            print(f"\n{_headline(item)}\n    why: {item.declared_why}")
            print(f"    suites: {', '.join(item.suites)}" + (f"; skip here: {item.skip}" if item.skip else ""))
    else:
        print("Each cell with its declared verdict and why: --list -v. Run one suite: --suite NAME.")
    return 0


def show_commands(request: "Request") -> int:
    """`--dry-run`: the exact serve command of each cell, on a line of its own below a comment that names the cell."""
    plan = request.plan
    if request.options.format == "json":
        print(json.dumps([as_json(item) for item in plan], indent=2))
        return 0
    for item in plan:
        print(f"# {_headline(item)}")
        if item.baseline:
            print(f"#   compared with {item.baseline.id}")
        if item.skip:
            print(f"#   skip here: {item.skip}")
        print(f"{command_line(item.cell)}\n")
    verdicts = Counter("skip" if item.skip else "run" for item in plan)
    print(
        f"# {plural(len(plan), 'cell')}: {verdicts['run']} run here, {verdicts['skip']} skipped. Nothing was started."
    )
    return 0


def command_line(cell: Cell) -> str:
    """The cell's command as a user would type it, its environment variables in front."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in cell.env), cell.shown()])


def as_json(item: PlannedCell) -> dict[str, Any]:
    """One planned cell for programs: what `--format json` prints."""
    return {
        "id": item.cell.id,
        "key": item.cell.key,
        "suites": list(item.suites),
        "declared": item.declared,
        "declared_why": item.declared_why,
        "refusal": item.refusal,
        "skip": item.skip,
        "baseline": item.baseline.id if item.baseline else None,
        "command": item.cell.command(),
        "shown": command_line(item.cell),
        "cell": item.cell.model_dump(mode="json"),
    }


def _headline(item: PlannedCell) -> str:
    return f"{TABLE[item.declared].symbol} {item.declared:<8}  {item.cell.id}"


def _suite_as_json(suite: Suite, plan: Sequence[PlannedCell], assumed: Sequence[str]) -> dict[str, Any]:
    count = _count(_of(suite, plan), assumed)
    document = {"name": suite.name, "description": suite.description, "cells": count.cells, "here": count.here}
    return document | ({"assumed": count.able - count.here} if assumed else {})


def _of(suite: Suite, plan: Sequence[PlannedCell]) -> list[PlannedCell]:
    return [item for item in plan if suite.name in item.suites]


class _Count(NamedTuple):
    """Cells, those that can run here, and those together with what hardware that is only assumed would run."""

    cells: int
    here: int
    able: int


def _count(plan: Sequence[PlannedCell], assumed: Sequence[str]) -> _Count:
    here = sum(item.skip is None for item in plan)
    return _Count(len(plan), here, here + sum(item.cell.hardware in assumed for item in plan))
