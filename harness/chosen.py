"""What selects the cells of a run: written into its ledger at the start, read back by `--resume`."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from harness import ledger
from harness.frozen import Frozen


class Chosen(Frozen):
    """As on the command line. `suites` is empty for `--all` and where only cells were named; files are absolute.

    Of a shard, `cells` are its cells by id, so that it is continued as it was cut; `expected` are those of all shards.
    """

    suites: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    hardware: tuple[str, ...] = ()
    share_gpu: bool = False
    runtime: str = "auto"
    repeat: int = 1
    shard: str = ""
    expected: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: argparse.Namespace, plan: Sequence[str] = (), whole: Sequence[str] = ()) -> "Chosen":
        """`plan` and `whole`: the ids of a shard and of all shards."""
        files = (".yaml", ".yml")
        return cls(
            suites=tuple(str(Path(name).resolve()) if name.endswith(files) else name for name in options.suite),
            cells=tuple(plan if options.shard else options.cell),
            hardware=tuple(options.hardware),
            share_gpu=options.share_gpu,
            runtime=options.runtime,
            repeat=options.repeat,
            shard=str(options.shard or ""),
            expected=tuple(whole) if options.shard else (),
        )

    def onto(self, options: argparse.Namespace) -> argparse.Namespace:
        """`options` with this selection."""
        chosen = {
            "all": not self.suites and not self.cells, "suite": list(self.suites), "cell": list(self.cells),
            "hardware": list(self.hardware), "share_gpu": self.share_gpu, "runtime": self.runtime,
            "repeat": self.repeat,
        }  # fmt: skip
        return argparse.Namespace(**{**vars(options), **chosen})


def find_run(asked: str, runs: Path) -> Path:
    """The folder of run `asked`: a path, a name in `runs`, or with "" the last one. ValueError, with what there is.

    Runs that `merge` made are passed over, unless asked for.
    """
    there = _unmerged(runs)
    if not asked:
        if not (last := next(there, None)):
            raise ValueError(f"--resume: there is no run in {runs}")
        return last
    for folder in (runs / asked, Path(asked).resolve()):
        if (folder / ledger.NAME).is_file():
            return folder
    last = ", ".join(path.name for path in [*islice(there, 3)][::-1]) or "none"
    raise ValueError(f"--resume {asked}: no run with a {ledger.NAME} there; the last ones in {runs}: {last}")


def read_chosen(run_dir: Path) -> Chosen:
    """What the run in `run_dir` was asked for. ValueError when its ledger does not say, or was merged."""
    try:
        start = _start(run_dir)
        if "merged" not in start:
            return Chosen.model_validate(start["chosen"])
    except (OSError, StopIteration, KeyError, ValidationError) as problem:
        raise ValueError(f"--resume: {run_dir / ledger.NAME} does not say which cells it was asked for") from problem
    raise ValueError(
        f"--resume: {run_dir} was made by merge and has no cells of its own to run; continue the run that was cut off, "
        "by --resume RUN, and merge again"
    )


def _unmerged(runs: Path) -> Iterator[Path]:
    """The folders of runs in `runs`, the last one first, but for those that `merge` made."""
    for path in sorted(runs.glob(f"*/{ledger.NAME}"), reverse=True):
        try:
            merged = "merged" in _start(path.parent)
        except (OSError, RecursionError, StopIteration):
            merged = False
        if not merged:
            yield path.parent


def _start(run_dir: Path) -> dict:
    events, _ = ledger.read(run_dir / ledger.NAME)
    return next(event for event in events if event["event"] == "run-start")
