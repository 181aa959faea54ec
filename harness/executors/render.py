"""`python -m harness render slurm|kubernetes`: the scripts or manifests of a run, for a cluster's own scheduler."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from harness.cell import Cell
from harness.chosen import Chosen
from harness.executors.kubernetes import KubernetesOptions, manifests
from harness.executors.render_arguments import parser, problem_of, problem_of_folders
from harness.executors.slurm import SlurmOptions, sbatch, submit
from harness.executors.tasks import Tasks, tasks_of
from harness.frozen import content_hash
from harness.hardware import choose, detect
from harness.ledger import Ledger
from harness.matrix import PlanError, expand, select
from harness.plain import plural
from harness.suite import CHECKOUT, ROOT, load_all
from harness.yaml_file import SuiteError

USAGE = 2
_NAMED = 3
INFRASTRUCTURE = 3


def main(argv: Sequence[str]) -> int:
    """Exit status 2 for bad usage, 3 where `bash -n` or `sbatch --test-only` refuses what was written."""
    options = parser(__doc__).parse_args(argv)
    if problem := problem_of(options):
        return _complain(problem)
    try:
        hardware = choose(options.hardware, detect())
        suites = load_all(options.suite)
        plan = select(expand(suites, hardware, options.share_gpu), options.cell)
    except PlanError as problem:
        return _complain(str(problem))
    except SuiteError as error:
        return _complain("; ".join(map(str, error.problems)))
    families = {device.family for device in hardware}
    plan = [item for item in plan if item.cell.hardware in families]
    others = {item.cell.id: _other(item.cell, options.vllm) for item in plan if item.cell.vllm_version != options.vllm}
    plan = [item for item in plan if item.cell.id not in others]
    tasks = tasks_of(plan, options.gpus_per_node, options.cores, options.memory)
    left_out = {**tasks.left_out, **others}
    if not tasks.groups:
        told = ", ".join(sorted(families))
        why = "".join(f"\n  {cell}: {reason}" for cell, reason in list(left_out.items())[:5])
        none = f"no cell is for {told}; see ./test_helix.sh --list"
        return _complain(f"all {len(left_out)} cells for {told} are left out, as:{why}" if why else none)
    mark = content_hash([[item.cell.key for item in plan], list(argv), time.time_ns(), os.getpid()])[:8]
    try:
        folder = options.into.resolve()
        runs = (options.runs or folder / "runs").resolve() if options.form == "slurm" else None
        if problem := problem_of_folders(options.form, folder, runs):
            return _complain(problem)
        for path in (folder, *([runs / "log"] if runs else [])):
            path.mkdir(parents=True, exist_ok=True)
        _tell(left_out, options.verbose)
        scripts = _slurm(tasks, options, folder, runs, mark) if runs else _kubernetes(tasks, options, folder, mark)
        chosen = Chosen(suites=tuple(options.suite), share_gpu=options.share_gpu).model_dump(mode="json")
        # What `merge` expects: what no task runs is not missing.
        Ledger((runs or folder) / "plan").run_start("plan", list(tasks.runs), [], sys.argv, chosen)
    except OSError as problem:
        where = problem.filename or options.into
        return _complain(f"cannot write {where}: {problem.strerror or problem}; name other folders (--into, --runs)")
    return max(map(_checked, scripts), default=0)


def _tell(left_out: Mapping[str, str], verbose: bool) -> None:
    """The cells that no task runs, by reason; of many the first few by name."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for cell, why in left_out.items():
        reasons[why].append(cell)
    for why, cells in reasons.items():
        named = cells if verbose else cells[:_NAMED]
        print(f"left out: {plural(len(cells), 'cell')}: {why}", *named, sep="\n  ")
        if len(named) < len(cells):
            print(f"  and {len(cells) - len(named)} more; all: -v")


def _other(cell: Cell, vllm: str) -> str:
    return f"needs vLLM {cell.vllm_version}; tasks have {vllm} (render it apart: --vllm {cell.vllm_version})"


def _slurm(tasks: Tasks, options: argparse.Namespace, folder: Path, runs: Path, mark: str) -> list[Path]:
    """The scripts."""
    made = SlurmOptions(
        mark=mark, root=ROOT if CHECKOUT else runs, runs=runs, lists=folder, image=options.image or "",
        partition=options.partition or "", account=options.account or "", time=options.time, at_once=options.at_once,
        select=tuple(options.select), arguments=_arguments(options),
    )  # fmt: skip
    scripts = {f"{group.name}.sbatch": sbatch(group, made) for group in tasks.groups}
    scripts["submit.sh"] = submit(tasks.groups, made, folder)
    for group in tasks.groups:
        (folder / f"{group.name}.txt").write_text("".join(f"{cell}\n" for cell in group.cells))
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    print("\n".join(f"{folder / f'{group.name}.sbatch'}: {plural(len(group.cells), 'cell')}" for group in tasks.groups))
    print(f"submit: {folder / 'submit.sh'}; then: python -m harness merge {runs}")
    return [folder / name for name in scripts]


def _checked(script: Path) -> int:
    """`bash -n`, and `sbatch --test-only` on a host of a cluster."""
    commands = [["bash", "-n", str(script)]]
    if script.suffix == ".sbatch" and shutil.which("sbatch"):
        commands.append(["sbatch", "--test-only", str(script)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)
            return INFRASTRUCTURE
    return 0


def _kubernetes(tasks: Tasks, options: argparse.Namespace, folder: Path, mark: str) -> list[Path]:
    """Writes manifests, of which this host can check nothing."""
    named = {name: value for name in ("claim", "models", "namespace") if (value := getattr(options, name))}
    made = KubernetesOptions(
        mark=mark, image=options.image, at_once=options.at_once, deadline=_seconds(options.time),
        select=tuple(options.select), arguments=_arguments(options), **named,
    )  # fmt: skip
    for group in tasks.groups:
        (folder / f"{group.name}.yaml").write_text(yaml.safe_dump_all(manifests(group, made), sort_keys=False))
        print(f"{folder / f'{group.name}.yaml'}: {plural(len(group.cells), 'cell')}")
    print(f"start: kubectl apply -f {folder}")
    print(f"then copy folder {mark} of claim {made.claim}: python -m harness merge COPY {folder / 'plan'}")
    return []


def _arguments(options: argparse.Namespace) -> tuple[str, ...]:
    """What every task asks the harness for beside its cell; a container on a node has no Docker in it."""
    words = [word for name in options.suite for word in ("--suite", name)]
    words += ["--share-gpu"] if options.share_gpu else []
    return (*words, *(["--runtime", "process"] if options.image else []))


def _seconds(text: str) -> int:
    hours, minutes, seconds = (int(part) for part in text.split(":"))
    return hours * 3600 + minutes * 60 + seconds


def _complain(message: str) -> int:
    print(f"render: error: {message}", file=sys.stderr)
    return USAGE
