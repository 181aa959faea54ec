"""What the page says of one cell, worked out before the template sees it."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from harness.report import drawing
from harness.report.measured import Measured, measured
from harness.report.naming import Name, name_of
from harness.report.past import CellPast
from harness.report.proofs import Proof, proof_of
from harness.report.run import Try
from harness.report.sidebyside import SideBySide, side_by_side
from harness.report.square import column_of
from harness.report.table import nearness
from harness.report.text import clean, fragment, number, packed, rerun, seconds
from harness.result import CellResult, Statistic
from harness.verdict import TABLE, Effect

_LOG_LINES = 12
#: Statistics that stand beside the curve; the others are one click away.
_NEAR = 10
#: A whole log travels inside the page up to this size, compressed; a longer one is linked.
_LOG_BYTES = 9_000


#: name, value, interval, bound, n, drawing, note
StatisticLine = tuple[str, str, str, str, str, Markup, str]


@dataclass(frozen=True)
class Row:
    """A cell's line in the list of cells. Facets are what the page filters by."""

    number: int  # place in the ledger
    result: CellResult
    kind: str
    column: str
    anchor: str
    name: Name
    differs: bool
    severity: int
    kv_ratio: float | None
    seconds: float | None
    nearness: float | None
    past: CellPast | None

    @cached_property
    def facets(self) -> dict[str, tuple[str, ...]]:
        """What the page filters by; a cell may be in several suites."""
        cell = self.result.cell
        return {
            "verdict": (str(self.result.verdict),),
            "kind": (self.kind,),
            "column": (self.column,),
            "hardware": (cell.hardware,),
            "backend": (cell.backend,),
            "model": (cell.model,),
            "tp": (str(cell.tp),),
            "kvp": (str(cell.kvp),),
            "comm": (cell.comm or "none",),
            "interleave": (str(cell.interleave),),
            "workload": (cell.workload,),
            "suite": self.result.suites,
            "declared": (str(self.result.declared),),
        }

    @property
    def order(self) -> str:
        """Numbers to sort by: severity, KV ratio, nearness, seconds; empty where there is none."""
        values = (self.severity, self.kv_ratio, self.nearness, self.seconds)
        return " ".join("-" if value is None or value != value else f"{value:.4g}" for value in values)


@dataclass(frozen=True)
class Body:
    """What opens below the line."""

    result: CellResult
    meaning: str
    rerun: str
    command: str
    facts: list[tuple[str, str]]
    proof: Proof | None
    near: list[StatisticLine]  # the statistics nearest to their bound, the nearest first
    further: list[StatisticLine]  # the others, those without a bound last
    curve: Markup
    plot: Markup
    differences: list[SideBySide]
    phases: list[tuple[str, str, str, Markup]]  # name, seconds, the baseline's, drawing
    kv: list[tuple[str, str, Markup]]  # whose, tokens, drawing
    kv_said: str
    measured: Measured | None
    baseline: str  # fragment of the baseline's cell, if it is in this run
    attempts: list[Try]  # more than one: all of this run, the oldest first
    past: CellPast | None
    log_end: str
    log_packed: str
    log_lines: int
    log_link: str


def row_of(
    number: int, result: CellResult, kind: str, severity: int, baseline: CellResult | None, past: CellPast | None
) -> Row:
    """`baseline` is the result that `result.baseline_id` names, where this run has it."""
    cell, column = result.cell, column_of(result.cell)
    tpa = cell.tpa if cell.kvp > 0 else None
    name = name_of(
        cell.id, column, cell.backend, cell.hardware, cell.model, cell.tp, cell.kvp, tpa, cell.comm, cell.interleave,
        cell.fault,
    )  # fmt: skip
    tokens = baseline.kv_cache_tokens if baseline else None
    return Row(
        number=number,
        result=result,
        kind=kind,
        column=column,
        anchor=fragment(cell=cell.id),
        name=name,
        differs=result.effect is Effect.DIFFERS,
        severity=severity,
        kv_ratio=result.kv_cache_tokens / tokens if result.kv_cache_tokens and tokens else None,
        seconds=sum(phase.seconds for phase in result.phases) if result.phases else None,
        nearness=nearness(result.statistics),
        past=past,
    )


def body_of(
    row: Row,
    baseline: CellResult | None = None,
    earlier: tuple[CellResult, ...] = (),
    tries: tuple[Try, ...] = (),
    image: str = "",
    code: str = "",
    log: Path | None = None,
    run_dir: Path | None = None,
    whole_log: bool = False,
) -> Body:
    """`image`, `code`: of the run. `log`: the cell's whole log, where it is on this disk.

    `whole_log`: the caller compresses the body.
    """
    result = row.result
    text, link = _log(result, log, run_dir)
    lines = clean(text).rstrip().splitlines()
    near, further = _by_nearness(result.statistics)
    whole = whole_log or len(lines) <= _LOG_LINES
    return Body(
        result=result,
        meaning=TABLE[result.verdict].sentence,
        rerun=rerun(result.cell.id),
        command=result.command or result.cell.shown(),
        facts=_facts(result, image, code),
        proof=proof_of(result.proof),
        near=[_statistic(one) for one in near],
        further=[_statistic(one) for one in further],
        curve=drawing.curve(result.curve),
        plot=drawing.gaps(result.differences),
        differences=side_by_side(result.differences),
        phases=_phases(result, baseline),
        kv=_kv(result, baseline),
        kv_said="" if row.kv_ratio is None else f"{row.kv_ratio:.2f} × the baseline's",
        measured=measured(result.bench),
        baseline=fragment(cell=baseline.cell.id) if baseline else "",
        attempts=_attempts(result, earlier, tries),
        past=row.past,
        log_end="\n".join(lines if whole else lines[-_LOG_LINES:]),
        log_packed="" if whole else packed("\n".join(lines)),
        log_lines=len(lines),
        log_link=link,
    )


def _attempts(result: CellResult, earlier: tuple[CellResult, ...], tries: tuple[Try, ...]) -> list[Try]:
    """As the ledger noted them; else the results of this run that later ones replaced, and the last."""
    if tries:
        return list(tries) if len(tries) > 1 else []
    if not earlier:
        return []
    return [
        Try(number=number, verdict=one.verdict, reason=one.reason, time=one.started)
        for number, one in enumerate((*earlier, result), start=1)
    ]


def _log(result: CellResult, log: Path | None, run_dir: Path | None) -> tuple[str, str]:
    """(text to show, link): the whole log where it is small, else the recorded tail and a link to the file."""
    if log is None or run_dir is None:
        return result.log_tail, ""
    link = quote(log.relative_to(run_dir).as_posix())
    try:
        if log.stat().st_size > 20 * _LOG_BYTES:
            return result.log_tail, link
        text = log.read_text(errors="replace")
    except OSError:
        return result.log_tail, ""
    return (text, link) if len(packed(text)) <= _LOG_BYTES else (result.log_tail, link)


def _by_nearness(statistics: tuple[Statistic, ...]) -> tuple[list[Statistic], list[Statistic]]:
    """The few nearest to their bound, with all beyond it, and the others; a value that is no number comes first."""

    def share(one: Statistic) -> float:
        if one.bound is None:
            return -math.inf
        found = nearness([one])
        return math.inf if found is None else found

    ranked = sorted(statistics, key=lambda one: -share(one))
    shown = max(_NEAR, sum(share(one) > 1 for one in ranked))
    bounded = [one for one in ranked if one.bound is not None]
    return bounded[:shown], [*bounded[shown:], *(one for one in ranked if one.bound is None)]


def _statistic(one: Statistic) -> StatisticLine:
    def shown(value: float) -> str:
        return f"{number(value)} {one.unit}".strip()

    interval = f"{number(one.low)} to {number(one.high)}" if one.low is not None and one.high is not None else ""
    bound = "none" if one.bound is None else shown(one.bound)
    return one.name, shown(one.value), interval, bound, f"{one.n:,}", drawing.against_bound(one), one.note


def _facts(result: CellResult, image: str, code: str) -> list[tuple[str, str]]:
    cell = result.cell
    facts = [
        ("model", cell.model),
        ("hardware", _hardware(result)),
        *result.versions,
        ("image digest", image or "none: processes of the host"),
        ("suites", ", ".join(result.suites) or "none"),
        ("workload", cell.workload),
        ("started", result.started[:19].replace("T", " ") or "not started"),
        ("attempts", str(result.attempts)),
        ("content key", cell.key),
    ]
    facts += [("code", code)] if code else []
    return facts + ([("transcript", result.transcript_digest)] if result.transcript_digest else [])


def _hardware(result: CellResult) -> str:
    family, name = result.cell.hardware, result.hardware_name
    return name if name.startswith(family) else f"{family} ({name})" if name else family


def _phases(result: CellResult, baseline: CellResult | None) -> list[tuple[str, str, str, Markup]]:
    """Seconds of each phase, with the baseline's below, on one scale."""
    other = {phase.name: phase.seconds for phase in baseline.phases} if baseline and baseline is not result else {}
    mine = [(phase.name, phase.seconds) for phase in result.phases]
    top = max((value for value in (*other.values(), *(took for _, took in mine)) if 0 <= value < 1e9), default=0.0)
    return [
        (
            name,
            seconds(took),
            seconds(other[name]) if name in other else "–" if other else "",
            drawing.pair(took, other.get(name), top),
        )
        for name, took in mine
    ]


def _kv(result: CellResult, baseline: CellResult | None) -> list[tuple[str, str, Markup]]:
    if result.kv_cache_tokens is None:
        return []
    found = [("this cell", result.kv_cache_tokens)]
    if baseline is not None and baseline is not result and baseline.kv_cache_tokens:
        found.append(("baseline", baseline.kv_cache_tokens))
    top = max(tokens for _, tokens in found)
    return [(whose, f"{tokens:,} tokens", drawing.pair(tokens, None, top)) for whose, tokens in found]
