"""The command line: which cells, and what to do with them. Parses, plans, dispatches; the work is done elsewhere.

An action is a function of a Request that returns the exit status. ACTIONS holds those chosen by a flag; a later
subcommand (`python -m harness NAME …`) is one more entry of SUBCOMMANDS.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from textwrap import fill, indent
from typing import TYPE_CHECKING, NamedTuple

from harness import listing, pytest_front
from harness.chosen import find_run, read_chosen
from harness.hardware import Hardware, choose, detect
from harness.matrix import PlanError, PlannedCell, expand, select, without_measured
from harness.need import Room, fit, host_cores, host_memory
from harness.run import RUNS, run
from harness.shard import Shard, cut, known_seconds, parse
from harness.suite import Family, Suite, load_all
from harness.yaml_file import SuiteError

if TYPE_CHECKING:
    from harness.executors.ray import RayExecutor

USAGE = 2
EXAMPLES = """\
examples:
  ./test_helix.sh --all                                  every cell that this hardware can run, then the report
  ./test_helix.sh --unit                                 the tests, without servers
  ./test_helix.sh --unit -k layout -x                    … what follows --unit goes to pytest
  ./test_helix.sh --list -v                              every cell with its declared verdict and why
  ./test_helix.sh --suite helix-gqa --suite smoke        two suites
  ./test_helix.sh --cell '*/helix-gqa/*/i16'             cells by id, with the baselines they need
  ./test_helix.sh --suite helix-gqa --dry-run            the serve command of each cell
  ./test_helix.sh --all --hardware hopper --dry-run      what a Hopper host would run
  ./test_helix.sh --all --share-gpu                      … on a host with one GPU
  ./test_helix.sh --resume                               what the last run, cut off, did not finish
  ./test_helix.sh --all --executor ray --address H:6379  on the hosts of a Ray cluster
  ./test_helix.sh --all --shard 2/3                      the second of three hosts' parts
  ./test_helix.sh merge DIR DIR                          several runs as one report
  ./test_helix.sh doctor                                 what this host can run, and what it lacks

exit status:
  0 every verdict as declared   1 a verdict about Helix differs from the declared one
  2 bad usage or suite file     3 only infrastructure errors (1 wins over 3)
"""

#: `python -m harness NAME …` -> `module:function`, called with the rest of the arguments, returns the exit status.
SUBCOMMANDS: dict[str, str] = {
    "alarms": "harness.oracle.alarms:main",
    "compare": "harness.report.look:compare_main",
    "doctor": "harness.doctor:main",
    "faults": "harness.oracle.caught:main",
    "history": "harness.report.look:history_main",
    "images": "harness.images:main",
    "issue": "harness.report.issue:main",
    "judge": "harness.oracle.offline:main",
    "merge": "harness.merge.command:main",
    "plan": "helix_runtime.planner.cli:main",
    "render": "harness.executors.render:main",
    "report": "harness.report.look:report_main",
    "starts": "harness.starts:main",
    "surface": "harness.surface:main",
}

_COMMANDS = ", ".join(["run", *SUBCOMMANDS])
_LISTED = f"\ncommands, each with its own --help:\n{indent(fill(_COMMANDS, 100), '  ')}\n"


class UsageError(ValueError):
    """The command line cannot be followed; the text says what can be done instead."""


class Request:
    """A parsed command line. Suites, hardware and plan are found when an action asks for them."""

    def __init__(self, options: argparse.Namespace, found: Callable[[], list[Hardware]] = detect):
        self.options = options
        self._found = found

    @cached_property
    def hardware(self) -> list[Hardware]:
        found = self.cluster.hardware if self.cluster else self._found()
        return choose(self.options.hardware, found)

    @cached_property
    def cluster(self) -> "RayExecutor | None":
        """The Ray cluster that `--executor ray` names, asked now what it has. UsageError where there is none."""
        if self.options.executor != "ray":
            return None
        try:
            from harness.executors.ray import ClusterError, RayExecutor
        except ImportError:
            raise UsageError("--executor ray needs the extra: pip install 'helix-parallel[ray]'") from None
        try:
            return RayExecutor(self.options.address, "docker" if self.options.runtime == "docker" else "process")
        except ClusterError as problem:
            raise UsageError(str(problem)) from None

    @cached_property
    def suites(self) -> list[Suite]:
        return load_all(self.options.suite)

    @cached_property
    def whole(self) -> list[PlannedCell]:
        """The plan of all shards."""
        plan = select(expand(self.suites, self.hardware, self.options.share_gpu), self.options.cell)
        if self.cluster:  # what its hosts can run, not what this one can
            return without_measured(fit(plan, self.cluster.largest))
        return fit(plan, Room(cores=host_cores(), memory_bytes=host_memory()))

    @cached_property
    def plan(self) -> list[PlannedCell]:
        if (shard := self.options.shard) is None:
            return self.whole
        return cut(self.whole, shard.parts, known_seconds(RUNS.parent))[shard.part - 1]


class Action(NamedTuple):
    chosen: Callable[[argparse.Namespace], object]
    do: Callable[[Request], int]


#: The first chosen one is done. A call that chooses cells and nothing else runs them.
ACTIONS = (
    Action(lambda o: o.unit is not None, lambda request: pytest_front.unit(request.options.unit)),
    Action(lambda o: o.nightly is not None, lambda request: pytest_front.nightly(request.options.nightly)),
    Action(lambda o: o.list, listing.show_list),
    Action(lambda o: o.dry_run, listing.show_commands),
    Action(lambda o: o.all or o.suite or o.cell or o.resume is not None, run),
)


def main(argv: Sequence[str] | None = None, found: Callable[[], list[Hardware]] = detect) -> int:
    """Run the command line; returns the exit status. `found` detects the hardware."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in SUBCOMMANDS:
        module, _, function = SUBCOMMANDS[argv[0]].partition(":")
        return getattr(importlib.import_module(module), function)(argv[1:])
    if argv and argv[0] != "run" and not argv[0].startswith("-"):
        return _complain(f"no command {argv[0]!r}; allowed: {_COMMANDS}")
    if argv[:1] == ["run"]:  # what is done with chosen cells anyway
        argv = argv[1:]
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
        _check(options)
        if options.resume is not None:
            options = _resumed(options)
        action = next((action for action in ACTIONS if action.chosen(options)), None)
        if action is None:
            parser.print_help()
            return 0 if not argv else _complain("nothing to do: add --all, --suite, --cell, --list or --unit")
        return action.do(Request(options, found))
    except (UsageError, PlanError) as error:
        return _complain(str(error))
    except SuiteError as error:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        return _complain(f"the suites cannot be used:\n{lines}", "the format: harness/schemas/suite-v1.json")
    except BrokenPipeError:  # `… --list | head`
        sys.stderr.close()
        return 0


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="test_helix.sh",
        description="Real vLLM servers with and without Helix, each compared with standard TP; draws the matrix.",
        epilog=EXAMPLES + _LISTED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = parser.add_argument_group("which cells")
    which.add_argument("--all", action="store_true", help="all suites")
    which.add_argument(
        "--suite", action="append", default=[], metavar="NAME", help="a suite, or a .yaml file; repeatable"
    )
    which.add_argument("--cell", action="append", default=[], metavar="GLOB", help="cells whose id matches; repeatable")
    which.add_argument(
        "--hardware",
        type=_families,
        default=[],
        metavar="LIST",
        help=f"plan for these instead of what is detected: {', '.join(_FAMILIES)}",
    )
    what = parser.add_argument_group("what to do (default: run them)")
    what.add_argument("--list", action="store_true", help="suites and how many cells run here; -v: each cell and why")
    what.add_argument("--dry-run", action="store_true", help="print the exact serve command of each cell")
    what.add_argument("--unit", nargs=argparse.REMAINDER, metavar="…", help="run the tests; the rest goes to pytest")
    what.add_argument("--nightly", nargs=argparse.REMAINDER, metavar="…", help="… and the heavy ones, with servers")
    how = parser.add_argument_group("how")
    how.add_argument("-v", "--verbose", action="store_true", help="with --list: each cell")
    how.add_argument("--format", choices=("text", "json"), default="text", help="of --list and --dry-run")
    how.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="cells that run at the same time, as far as the host has room (default 2 where all run on CPU, else 1)",
    )
    how.add_argument("--executor", choices=("local", "ray"), default="local", help="this host, or a Ray cluster")
    how.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster (default: the one this host is in)")
    how.add_argument("--runtime", choices=("auto", "process", "docker"), default="auto", help="where servers run")
    how.add_argument(
        "--share-gpu", action="store_true", help="all ranks of a GPU cell on one GPU: for validation, not for speed"
    )
    how.add_argument(
        "--repeat", type=_positive, default=1, metavar="N", help="judge each cell N times; `flaky` where they disagree"
    )
    how.add_argument(
        "--shard", type=_shard, metavar="I/N", help="the I-th of N parts that take about as long; then merge"
    )
    how.add_argument("--run-dir", metavar="DIR", help="folder of this run (default reports/runs/TIME-HASH)")
    how.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="continue a run that was cut off (default: the last one)"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse says what is wrong; this adds the next command."""

    def error(self, message: str):
        raise UsageError(message)


_FAMILIES = Family.__args__


def _families(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in _FAMILIES:
            raise argparse.ArgumentTypeError(f"'{name}'; allowed: {', '.join(_FAMILIES)}, separated by commas")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: a whole number from 1")
    return int(text)


def _shard(text: str) -> Shard:
    try:
        return parse(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def _check(options: argparse.Namespace) -> None:
    """Combinations that argparse cannot refuse."""
    if options.all and options.suite:
        raise UsageError("--all is every suite; give either --all or --suite")
    if options.list and options.dry_run:
        raise UsageError("give either --list or --dry-run")
    if options.resume is not None:
        others = {
            "--all": options.all, "--suite": options.suite, "--cell": options.cell, "--hardware": options.hardware,
            "--share-gpu": options.share_gpu, "--run-dir": options.run_dir, "--runtime": options.runtime != "auto",
            "--repeat": options.repeat != 1, "--shard": options.shard,
        }  # fmt: skip
        if given := [name for name, value in others.items() if value]:
            raise UsageError(f"--resume runs what that run was asked for; leave out {', '.join(given)}")
    if options.address and options.executor != "ray":
        raise UsageError("--address goes with --executor ray")
    if options.format != "text" and not (options.list or options.dry_run):
        raise UsageError("--format goes with --list and --dry-run; a run writes results.json into its folder")


def _resumed(options: argparse.Namespace) -> argparse.Namespace:
    """`options` with the folder and the selection of the run that `--resume` names."""
    try:
        run_dir = find_run(options.resume, RUNS)
        return argparse.Namespace(**{**vars(read_chosen(run_dir).onto(options)), "run_dir": str(run_dir)})
    except ValueError as problem:
        raise UsageError(str(problem)) from problem


def _complain(
    message: str, hint: str = "all options: ./test_helix.sh --help; all cells: ./test_helix.sh --list -v"
) -> int:
    print(f"test_helix.sh: error: {message}\n{hint}", file=sys.stderr)
    return USAGE
