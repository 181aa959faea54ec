"""Running the plan: folder, runtime, runner, summary, report. The runner itself is `harness.runner`."""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.chosen import Chosen
from harness.durations import seconds_before
from harness.frozen import content_hash
from harness.hardware import Hardware
from harness.interrupts import deaf
from harness.ledger import LedgerBusy
from harness.matrix import PlannedCell
from harness.plain import clean, plural
from harness.result import CellResult
from harness.suite import REPORTS
from harness.verdict import TABLE, Effect, Verdict, exit_status

if TYPE_CHECKING:
    from harness.cli import Request
    from harness.executors.ray import RayExecutor
    from harness.progress import Progress

RUNS = REPORTS / "runs"
INTERRUPTED = 130
INFRASTRUCTURE = 3


class Runner(Protocol):
    """Runs a plan: one result a cell, skipped ones included; each also appended to `run_dir/ledger.ndjson`."""

    def __call__(
        self,
        plan: list[PlannedCell],
        *,
        run_dir: Path,
        jobs: int,
        runtime: str,
        progress: object,
        repeat: int,
        resume: bool,
        chosen: dict,
    ) -> list[CellResult]: ...


class Reporter(Protocol):
    """Writes index.html, results.json and junit.xml from the ledger of a run; returns the page."""

    def __call__(self, run_dir: Path) -> Path: ...


def run(request: "Request", runner: Runner | None = None, reporter: Reporter | None = None) -> int:
    """Run the request's plan and write its report. Returns the exit status; 130 after Ctrl-C."""
    from harness.cli import UsageError

    options, plan = request.options, request.plan
    if request.cluster:  # its hosts have said that they can
        runtime, why = request.cluster.runtime, "on the hosts of the cluster"
    else:
        runtime, why = choose_runtime(options.runtime, request.hardware)
    assumed = [device.family for device in request.hardware if not device.detected]
    if assumed:
        raise UsageError(f"--hardware {','.join(assumed)}: not on this host, so it goes with --list and --dry-run only")
    resume = options.resume is not None
    run_dir = Path(options.run_dir) if resume else make_run_dir(options.run_dir, plan)
    skipped = sum(item.skip is not None for item in plan)
    cluster = request.cluster
    jobs = options.jobs or (cluster.width if cluster else usual_jobs(plan))
    print(f"hardware: {' and '.join(str(device) for device in request.hardware)}")
    print(f"runtime: {runtime} ({why})")
    print(
        f"cells: {len(plan)}, of which {len(plan) - skipped} run here and {skipped} are skipped; jobs: {jobs}"
        + (f"; shard {options.shard} of {plural(len(request.whole), 'cell')}" if options.shard else "")
    )
    if cluster:
        print(f"executor: ray, {plural(cluster.hosts, 'host')}")
    print(f"folder: {shown(run_dir)}", flush=True)

    runner = runner or _runner()
    interrupted = False
    chosen = Chosen.of(options, *([item.cell.id for item in cells] for cells in (plan, request.whole)))
    try:
        with _progress(run_dir, plan, jobs) as progress:
            results = runner(
                plan, run_dir=run_dir, jobs=jobs, runtime=runtime, progress=progress, repeat=options.repeat,
                resume=resume, chosen=chosen.model_dump(mode="json"), **(_of_cluster(cluster) if cluster else {}),
            )  # fmt: skip
    except LedgerBusy as error:
        raise UsageError(f"{error}; wait for it, or end it") from error
    except OSError as error:
        return _disk(error, run_dir)
    except KeyboardInterrupt:
        # The runner has ended its servers by now; what was finished is in the ledger, and is reported.
        interrupted, results = True, []
    if interrupted and not (run_dir / "ledger.ndjson").stat().st_size:
        print("interrupted before any cell was finished; no report")
        return INTERRUPTED
    try:
        with deaf() if interrupted else nullcontext():
            page = (reporter or _reporter())(run_dir)
    except OSError as error:
        return _disk(error, run_dir)
    if interrupted:
        print(f"\ninterrupted; what was finished before is in the report\nreport: {shown(page)}")
        print(f"continue: {resume_command(run_dir)}")
        return INTERRUPTED
    print_summary(results)
    print(f"report: {shown(page)}")
    return exit_status([(result.declared, result.verdict) for result in results])


def usual_jobs(plan: Sequence[PlannedCell]) -> int:
    """Two on CPU: cells that need one core, TP1 and refusals, then run side by side; a larger one takes all cores of a
    small host and waits for them. One where a GPU or a measurement is to be left alone."""
    running = [item for item in plan if item.skip is None]
    return 2 if all(item.cell.hardware == "cpu" and item.bench is None for item in running) else 1


def _disk(error: OSError, run_dir: Path) -> int:
    """A disk that is full or went away says nothing about Helix: exit status 3, and what is kept."""
    print(
        f"cannot write: {error.strerror or error} ({error.filename or run_dir}); the cells that finished are in "
        f"{shown(run_dir / 'ledger.ndjson')}. Make room, then {resume_command(run_dir)}",
        file=sys.stderr,
    )
    return INFRASTRUCTURE


def resume_command(run_dir: Path) -> str:
    """What continues the run in `run_dir`."""
    return f"./test_helix.sh --resume {run_dir.name if run_dir.parent == RUNS else run_dir}"


def choose_runtime(asked: str, hardware: Sequence[Hardware]) -> tuple[str, str]:
    """(runtime, why): `auto` takes containers on a host with GPUs, Docker and an image of this code.

    Raises UsageError for `docker` where no daemon answers, or where the image is missing.
    """
    from harness.cli import UsageError

    if asked == "process":
        return "process", "as asked"
    if asked == "auto" and all(device.family == "cpu" for device in hardware):
        return "process", "auto: no GPU here, so servers run as processes of this user"
    from harness.server.containers import Containers, NoDocker

    try:
        images = Containers.found().images
        needed = sorted({"cpu" if device.family == "cpu" else "cuda" for device in hardware})
        if missing := [kind for kind in needed if kind not in images]:
            raise NoDocker(f"no image of this code; build it: python -m harness images build {missing[0]}")
    except NoDocker as problem:
        if asked == "docker":
            raise UsageError(f"--runtime docker: {problem}") from None
        return "process", f"auto: {problem}"
    told = ", ".join(f"{kind} {images[kind].digest.removeprefix('sha256:')[:12]}" for kind in needed)
    return "docker", f"{'as asked' if asked == 'docker' else 'auto'}; images: {told}"


def make_run_dir(asked: str | None, plan: Sequence[PlannedCell]) -> Path:
    """A new, empty folder. Raises UsageError if `asked` already holds a run."""
    from harness.cli import UsageError

    if asked:
        folder = Path(asked).resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--run-dir {asked} is there and not empty; name a new folder")
        _make(folder)
        return folder
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    unique = content_hash([[item.cell.key for item in plan], time.time_ns(), os.getpid()])[:6]
    folder = RUNS / f"{stamp}-{unique}"
    _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Raises UsageError where the folder cannot be made or written."""
    from harness.cli import UsageError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ledger.ndjson").touch()
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}; name another folder with --run-dir") from None


def print_summary(results: Sequence[CellResult]) -> None:
    """A line per cell that ran, one line per reason of skipped ones, then the counts."""
    print()
    skips = Counter()
    for result in results:
        if result.verdict is Verdict.SKIP:
            skips[result.reason] += 1
            continue
        print(f"{TABLE[result.verdict].symbol} {result.verdict:<8}  {result.cell.id}")
        if result.effect is not Effect.OK:
            print(f"    declared {result.declared}: {result.declared_why}\n    {clean(result.reason)}")
    for reason, number in skips.items():
        print(f"{TABLE[Verdict.SKIP].symbol} {Verdict.SKIP:<8}  {plural(number, 'cell')}: {reason}")
    counts = Counter(result.verdict for result in results)
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    print(f"\n{plural(len(results), 'cell')}: {words or 'nothing was run'}")
    if counts[Verdict.XPASS]:
        print(f"XPASS: {plural(counts[Verdict.XPASS], 'known limitation')} gone. Update the declared table")


def shown(path: Path) -> str:
    """`path` as the reader would type it: relative to where the command was called, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _progress(run_dir: Path, plan: Sequence[PlannedCell], jobs: int) -> "AbstractContextManager[Progress]":
    """How the run is shown: see `harness.progress`."""
    from harness.progress import shown as show
    from harness.runner import folder_name

    folders = {item.cell.id: run_dir / "cells" / folder_name(item.cell) for item in plan}
    return show(run_dir, plan, jobs, seconds_before(RUNS.parent), folders)


def _runner() -> Runner:
    from harness.runner import run as run_cells

    def run_and_measure_models(plan: list[PlannedCell], *, run_dir: Path, **more) -> list[CellResult]:
        results = run_cells(plan, run_dir=run_dir, **more)
        record_cards(run_dir, results)
        return results

    return run_and_measure_models


def _of_cluster(cluster: "RayExecutor") -> dict:
    """What the runner is told of hosts that are not this one."""
    return {"executor": cluster, "site": cluster.site}


def record_cards(run_dir: Path, results: Sequence[CellResult]) -> None:
    """The card of each made model whose servers answered, into the run's ledger. No part of any verdict.

    Measured two at a time, because the run waits for them, and each takes up to a GiB.
    """
    from harness.ledger import Ledger
    from harness.models.recipe import PREFIX
    from harness.models.sheet import card_of

    def card(model: str) -> dict | None:
        try:
            return card_of(model).model_dump(mode="json")
        except Exception as problem:  # a run is not lost to what only describes its models
            print(f"no card of {model}: {type(problem).__name__}: {problem}", flush=True)
            return None

    made = sorted({result.cell.model for result in results if result.transcript_digest})
    with ThreadPoolExecutor(2) as pool:
        cards = list(filter(None, pool.map(card, (model for model in made if model.startswith(PREFIX)))))
    if cards:
        Ledger(run_dir).models(cards)


def _reporter() -> Reporter:
    from harness.report import index, write

    def write_and_list(run_dir: Path) -> Path:
        page = write(run_dir, REPORTS)
        if run_dir.resolve().is_relative_to(REPORTS.resolve()):
            index(REPORTS)
        return page

    return write_and_list
