"""What the page says of one cell, worked out before the template sees it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from harness.report import drawing
from harness.report.bounds import Lines, by_nearness
from harness.report.measured import Measured, measured
from harness.report.naming import Name, name_of
from harness.report.past import CellPast
from harness.report.proofs import Proof, proof_of
from harness.report.run import Try
from harness.report.sidebyside import SideBySide, side_by_side
from harness.report.square import column_of
from harness.report.table import nearness
from harness.report.text import clean, definitions, escaped, fragment, packed, rerun, seconds
from harness.result import CellResult
from harness.verdict import TABLE, Effect

_LOG_LINES = 12
#: A whole log travels inside the page up to this size, compressed; a longer one is linked.
_LOG_BYTES = 9_000


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
    def attributes(self) -> Markup:
        """The facets and the cell's id, as the page's script reads them."""
        told = escaped([self.result.cell.id, *("\n".join(values) for values in self.facets.values())])
        names = ("id", *self.facets)
        return Markup("".join(f' data-{name}="{value}"' for name, value in zip(names, told, strict=True)))

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
    facts: Markup  # of a definition list
    proof: Proof | None
    near: Lines  # the statistics nearest to their bound
    further: Lines  # the others
    curve: Markup
    plot: Markup
    differences: list[SideBySide]
    phases: Markup  # rows of a table: name, seconds, the baseline's where it is in this run, drawing
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
    near, further = by_nearness(result.statistics)
    whole = whole_log or len(lines) <= _LOG_LINES
    return Body(
        result=result,
        meaning=TABLE[result.verdict].sentence,
        rerun=rerun(result.cell.id),
        command=result.command or result.cell.shown(),
        facts=definitions(_facts(result, image, code)),
        proof=proof_of(result.proof),
        near=near,
        further=further,
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


def _phases(result: CellResult, baseline: CellResult | None) -> Markup:
    """Seconds of each phase, with the baseline's below, on one scale."""
    other = {phase.name: phase.seconds for phase in baseline.phases} if baseline and baseline is not result else {}
    mine = [(phase.name, phase.seconds) for phase in result.phases]
    top = max((value for value in (*other.values(), *(took for _, took in mine)) if 0 <= value < 1e9), default=0.0)
    names = escaped([name for name, _ in mine])
    rows = []
    for label, (name, took) in zip(names, mine, strict=True):
        theirs = seconds(other[name]) if name in other else "–" if other else ""
        column = f'<td class="n">{theirs}</td>' if baseline else ""
        drawn = drawing.pair(took, other.get(name), top)
        rows.append(f'<tr><th scope="row">{label}</th><td class="n">{seconds(took)}</td>{column}<td>{drawn}</td></tr>')
    return Markup("".join(rows))


def _kv(result: CellResult, baseline: CellResult | None) -> list[tuple[str, str, Markup]]:
    if result.kv_cache_tokens is None:
        return []
    found = [("this cell", result.kv_cache_tokens)]
    if baseline is not None and baseline is not result and baseline.kv_cache_tokens:
        found.append(("baseline", baseline.kv_cache_tokens))
    top = max(tokens for _, tokens in found)
    return [(whose, f"{tokens:,} tokens", drawing.pair(tokens, None, top)) for whose, tokens in found]
