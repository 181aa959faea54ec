"""What selects the cells of a run: written into its ledger at the start, read back by `--resume`."""

import argparse
from collections.abc import Sequence
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
    """The folder of run `asked`: a path, a name in `runs`, or with "" the last one. ValueError, with what there is."""
    there = sorted(path.parent for path in runs.glob(f"*/{ledger.NAME}"))
    if not asked:
        if not there:
            raise ValueError(f"--resume: there is no run in {runs}")
        return there[-1]
    for folder in (runs / asked, Path(asked).resolve()):
        if (folder / ledger.NAME).is_file():
            return folder
    last = ", ".join(path.name for path in there[-3:]) or "none"
    raise ValueError(f"--resume {asked}: no run with a {ledger.NAME} there; the last ones in {runs}: {last}")


def read_chosen(run_dir: Path) -> Chosen:
    """What the run in `run_dir` was asked for. ValueError when its ledger does not say."""
    try:
        events, _ = ledger.read(run_dir / ledger.NAME)
        start = next(event for event in events if event["event"] == "run-start")
        return Chosen.model_validate(start["chosen"])
    except (OSError, StopIteration, KeyError, ValidationError) as problem:
        raise ValueError(f"--resume: {run_dir / ledger.NAME} does not say which cells it was asked for") from problem
