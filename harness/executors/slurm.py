"""A run as Slurm job arrays: one script a group of tasks, one array index a cell."""

import shlex
from pathlib import Path

from harness.executors.tasks import Group
from harness.frozen import Frozen


class SlurmOptions(Frozen):
    """`image`: a container for pyxis/enroot, "" to run on the node itself; `runs`: where every task leaves its ledger.

    `mark` is this rendering's own: its tasks find their own runs again, and no others.

    `select`: hardware -> the Slurm feature that nodes with it have. `root` is this checkout, on a shared file system;
    of an installed distribution, whose code is in the image, the folder of runs.
    """

    mark: str
    root: Path
    runs: Path
    lists: Path
    image: str = ""
    partition: str = ""
    account: str = ""
    time: str = "02:00:00"
    at_once: int = 16
    select: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()  # of the harness, for every task


def sbatch(group: Group, options: SlurmOptions) -> str:
    """The script of one group. A task that Slurm starts again continues its own run."""
    feature = dict(options.select).get(group.hardware, "" if group.hardware == "cpu" else group.hardware)
    directives = [
        f"--job-name=helix-{group.name}-{options.mark}",
        f"--array=0-{len(group.cells) - 1}%{options.at_once}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={max(group.cores, 1)}",
        f"--time={options.time}",
        "--requeue",
        f"--output={options.runs}/log/%x-%a.txt",
        "--open-mode=append",
    ]
    directives += [f"--gpus-per-node={group.gpus}"] if group.gpus else []
    directives += [f"--mem={-(-group.memory_bytes // 2**20)}M"] if group.memory_bytes else []
    directives += [f"--constraint={feature}"] if feature else []
    directives += [f"--partition={options.partition}"] if options.partition else []
    directives += [f"--account={options.account}"] if options.account else []
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {directive}" for directive in directives),
            "# One cell of a Helix run, with the baselines it is compared with. Its ledger goes to `merge`.",
            "set -euo pipefail",
            "",
            f"mapfile -t cells <{shlex.quote(str(options.lists / f'{group.name}.txt'))}",
            "cell=${cells[$SLURM_ARRAY_TASK_ID]}",
            f'run={shlex.quote(str(options.runs / f"{group.name}-{options.mark}"))}-"$SLURM_ARRAY_TASK_ID"',
            f"cd {shlex.quote(str(options.root))}",
            "",
            "if [[ -s $run/ledger.ndjson ]]; then # requeued",
            '  arguments=(--resume "$run")',
            "else",
            f'  arguments=(--cell "$cell" --run-dir "$run"{_words(options.arguments)})',
            "fi",
            f'exec {_start(options)} "${{arguments[@]}}"',
            "",
        ]
    )


def submit(groups: tuple[Group, ...], options: SlurmOptions, folder: Path) -> str:
    """A script that submits all groups."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"mkdir -p {shlex.quote(str(options.runs / 'log'))}"]
    lines += [f"sbatch --parsable {shlex.quote(str(folder / f'{group.name}.sbatch'))}" for group in groups]
    lines += [f"# when all have ended: python -m harness merge {shlex.quote(str(options.runs))}", ""]
    return "\n".join(lines)


def _start(options: SlurmOptions) -> str:
    srun = 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK"'  # from Slurm 22.05 on, it does not inherit it of sbatch
    if not options.image:
        return f"{srun} ./test_helix.sh"
    mounts = ",".join(f"{path}:{path}" for path in dict.fromkeys((options.root, options.runs, options.lists)))
    container = [
        f"--container-image={options.image}", f"--container-mounts={mounts}", f"--container-workdir={options.root}"
    ]  # fmt: skip
    return f"{srun} {shlex.join(container)} python3 -m harness"


def _words(arguments: tuple[str, ...]) -> str:
    return f" {shlex.join(arguments)}" if arguments else ""
