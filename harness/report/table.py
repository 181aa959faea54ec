"""The run as one pandas table, a row a cell: for notebooks, for the CSV, and for the matrix's pivot."""

import math
from collections.abc import Iterable

import pandas as pd

from harness.report.run import Run
from harness.report.square import column_of, kind_of, latent_models
from harness.result import Statistic

#: Columns that every table has, also an empty one. `stat:NAME` columns follow, one for each statistic of the oracle.
COLUMNS = [
    "run",
    "run_started",
    "id",
    "key",
    "kind",
    "column",
    "mode",
    "backend",
    "hardware",
    "model",
    "tp",
    "kvp",
    "tpa",
    "interleave",
    "comm",
    "fault",
    "suites",
    "declared",
    "verdict",
    "effect",
    "reason",
    "declared_why",
    "baseline_id",
    "kv_cache_tokens",
    "kv_ratio",
    "seconds",
    "attempts",
    "started",
    "hardware_name",
    "vllm",
    "versions",
    "command",
    "nearness",
]
_NUMBERS = ("kv_cache_tokens", "kv_ratio", "seconds", "nearness")


def tabulate(run: Run) -> pd.DataFrame:
    """One row a cell; missing numbers are NA.

    `kv_ratio`: KV capacity over the baseline's. `seconds`: sum of the phases. `nearness`: see `nearness`.
    """
    latent = latent_models(result.cell for result in run.results)
    tokens = {result.cell.id: result.kv_cache_tokens for result in run.results}
    rows = []
    for result in run.results:
        cell, baseline = result.cell, tokens.get(result.baseline_id)
        rows.append(
            {
                "run": run.name,
                "run_started": run.started,
                "id": cell.id,
                "key": cell.key,
                "kind": kind_of(cell, latent),
                "column": column_of(cell),
                "mode": str(cell.mode),
                "backend": cell.backend,
                "hardware": cell.hardware,
                "model": cell.model,
                "tp": cell.tp,
                "kvp": cell.kvp,
                "tpa": cell.tpa if cell.kvp > 0 else pd.NA,
                "interleave": cell.interleave,
                "comm": cell.comm or "",
                "fault": cell.fault or "",
                "suites": " ".join(result.suites),
                "declared": str(result.declared),
                "verdict": str(result.verdict),
                "effect": str(result.effect),
                "reason": result.reason,
                "declared_why": result.declared_why,
                "baseline_id": result.baseline_id or "",
                "kv_cache_tokens": result.kv_cache_tokens,
                "kv_ratio": result.kv_cache_tokens / baseline if result.kv_cache_tokens and baseline else None,
                "seconds": sum(phase.seconds for phase in result.phases) if result.phases else None,
                "attempts": result.attempts,
                "started": result.started,
                "hardware_name": result.hardware_name,
                "vllm": dict(result.versions).get("vllm", cell.vllm_version),
                "versions": "; ".join(f"{name} {value}" for name, value in result.versions),
                "command": result.command,
                "nearness": nearness(result.statistics),
                **{f"stat:{statistic.name}": statistic.value for statistic in result.statistics},
            }
        )
    table = pd.DataFrame(rows, columns=None if rows else COLUMNS)
    return table.astype(dict.fromkeys(_NUMBERS, "Float64"))


def nearness(statistics: Iterable[Statistic]) -> float | None:
    """The statistic nearest to its bound, as value / bound: above 1 is a difference. None where nothing is bounded."""
    shares = [share(one.value, one.bound) for one in statistics if one.bound is not None]
    return max((one for one in shares if one == one), default=None)


def share(value: float, bound: float) -> float:
    """value / bound. A bound of 0 counts things that must not occur: 0 while none does, infinite from the first."""
    if bound == 0:
        return 0.0 if value <= 0 else math.inf
    return value / bound if bound == bound else math.nan
