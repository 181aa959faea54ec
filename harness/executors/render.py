"""`python -m harness render slurm|kubernetes`: the scripts or manifests of a run, for a cluster's own scheduler."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from harness.chosen import Chosen
from harness.executors.kubernetes import KubernetesOptions, manifests
from harness.executors.slurm import SlurmOptions, sbatch, submit
from harness.executors.tasks import Tasks, tasks_of
from harness.hardware import choose, detect
from harness.ledger import Ledger
from harness.matrix import PlanError, expand, select
from harness.plain import plural
from harness.suite import ROOT, Family, load_all
from harness.yaml_file import SuiteError

USAGE = 2
INFRASTRUCTURE = 3


def main(argv: Sequence[str]) -> int:
    """Exit status 2 for bad usage, 3 where `bash -n` or `sbatch --test-only` refuses what was written."""
    options = _parser().parse_args(argv)
    try:
        hardware = choose(options.hardware, detect())
        suites = load_all(options.suite)
        plan = select(expand(suites, hardware, options.share_gpu), options.cell)
    except PlanError as problem:
        return _complain(str(problem))
    except SuiteError as error:
        return _complain("; ".join(map(str, error.problems)))
    families = {device.family for device in hardware}
    tasks = tasks_of([item for item in plan if item.cell.hardware in families], options.gpus_per_node, options.cores)
    if not tasks.groups:
        return _complain(f"no cell is for {', '.join(sorted(families))}; see ./test_helix.sh --list")
    folder = options.into.resolve()
    if folder.exists() and any(folder.iterdir()):
        return _complain(f"--into {options.into} is there and not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    planned = [item.cell.id for item in plan if item.cell.hardware in families]
    plan_dir = (options.runs or folder / "runs") / "plan" if options.form == "slurm" else folder / "plan"
    chosen = Chosen(suites=tuple(options.suite), share_gpu=options.share_gpu)
    Ledger(plan_dir).run_start("plan", planned, [], sys.argv, chosen.model_dump(mode="json"))  # what `merge` expects
    status = _slurm(tasks, options, folder) if options.form == "slurm" else _kubernetes(tasks, options, folder)
    for cell, why in tasks.left_out.items():
        print(f"left out: {cell}: {why}")
    return status


def _slurm(tasks: Tasks, options: argparse.Namespace, folder: Path) -> int:
    runs = (options.runs or folder / "runs").resolve()
    made = SlurmOptions(
        root=ROOT, runs=runs, lists=folder, image=options.image, partition=options.partition, account=options.account,
        time=options.time, at_once=options.at_once, select=tuple(options.select), arguments=_arguments(options),
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
    return max(map(_checked, (folder / name for name in scripts)))


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


def _kubernetes(tasks: Tasks, options: argparse.Namespace, folder: Path) -> int:
    if not options.image:
        return _complain("--image is needed: pods run in it")
    made = KubernetesOptions(
        image=options.image, claim=options.claim, models=options.models, namespace=options.namespace,
        at_once=options.at_once, deadline=_seconds(options.time), select=tuple(options.select),
        arguments=_arguments(options),
    )  # fmt: skip
    for group in tasks.groups:
        (folder / f"{group.name}.yaml").write_text(yaml.safe_dump_all(manifests(group, made), sort_keys=False))
        print(f"{folder / f'{group.name}.yaml'}: {plural(len(group.cells), 'cell')}")
    print(f"start: kubectl apply -f {folder}")
    print(f"then copy the volume of claim {made.claim}: python -m harness merge COPY {folder / 'plan'}")
    return 0


def _arguments(options: argparse.Namespace) -> tuple[str, ...]:
    """What every task asks the harness for beside its cell; a container on a node has no Docker in it."""
    words = [word for name in options.suite for word in ("--suite", name)]
    words += ["--share-gpu"] if options.share_gpu else []
    return (*words, *(["--runtime", "process"] if options.image else []))


def _seconds(text: str) -> int:
    hours, minutes, seconds = (int(part) for part in text.split(":"))
    return hours * 3600 + minutes * 60 + seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness render", description=__doc__, allow_abbrev=False)
    parser.add_argument("form", choices=("slurm", "kubernetes"))
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="new folder for what is written")
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="repeatable; default: all suites")
    parser.add_argument(
        "--cell", action="append", default=[], metavar="GLOB", help="cells whose id matches; repeatable"
    )
    parser.add_argument("--hardware", type=_families, default=[], metavar="LIST", help="default: this host's")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks of a GPU cell on one GPU")
    parser.add_argument("--image", default="", help="container image; Slurm: by pyxis/enroot, without one on the node")
    parser.add_argument("--at-once", type=int, default=16, metavar="N", help="cells at the same time (default 16)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--cores", type=int, default=16, metavar="N", help="cores of a node (default 16)")
    parser.add_argument("--time", type=_time, default="02:00:00", metavar="HH:MM:SS", help="limit for one cell")
    parser.add_argument(
        "--select", type=_pair, action="append", default=[], metavar="HARDWARE=…",
        help="Slurm: the feature of its nodes (hopper=h200); Kubernetes: their label (hopper=gpu/type=h200)",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, metavar="DIR", help="Slurm: shared folder for ledgers (default DIR/runs)")
    parser.add_argument("--partition", default="", help="Slurm")
    parser.add_argument("--account", default="", help="Slurm")
    parser.add_argument("--claim", default="helix-runs", help="Kubernetes: volume claim for ledgers")
    parser.add_argument("--models", default="", metavar="CLAIM", help="Kubernetes: volume claim with a hub cache")
    parser.add_argument("--namespace", default="default", help="Kubernetes")
    return parser


def _families(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in Family.__args__]:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}'; allowed: {', '.join(Family.__args__)}, separated by commas")
    return names


def _time(text: str) -> str:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: HH:MM:SS")
    return text


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in Family.__args__ or not value:
        known = ", ".join(Family.__args__)
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: HARDWARE=VALUE, hardware one of {known}")
    return name, value


def _complain(message: str) -> int:
    print(f"render: error: {message}", file=sys.stderr)
    return USAGE
