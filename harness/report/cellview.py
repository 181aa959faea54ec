"""What the page says of one cell, worked out before the template sees it."""

from dataclasses import dataclass

from markupsafe import Markup

from harness.report import drawing
from harness.report.square import column_of
from harness.report.text import clean, fragment, number, packed, rerun, seconds, table_row
from harness.result import CellResult, Difference
from harness.verdict import TABLE, Effect

#: Order and headings of the proof's columns; fields that are not named here come after, under their own name.
_PROOF = {
    "rank": "rank",
    "tpa_rank": "TPA rank",
    "kvp_rank": "KVP rank",
    "group_ranks": "exchange group",
    "backend": "backend",
    "impl": "attention",
    "combine": "combine",
    "combine_impl": "combined by",
    "group_size": "group size",
    "tp": "TP",
    "kvp": "KVP",
    "tpa": "TPA",
    "helix": "Helix",
    "interleave": "interleave",
    "lse_base": "LSE base",
    "self_test": "self-test",
    "model_runner": "model runner",
    "vllm_version": "vLLM",
    "decode_attention": "decode attention calls",
    "decode_combine": "decode combines",
    "prefill_attention": "prefill attention calls",
    "prefill_combine": "prefill combines",
    "empty_shard": "empty shards",
    "local_tokens": "KV tokens here",
    "global_tokens": "KV tokens seen",
}
#: Always a column, also where all ranks agree: a rank that ran no combine must be seen at once.
_ALWAYS = {"rank", "tpa_rank", "kvp_rank", "group_ranks", "decode_attention", "decode_combine", "local_tokens"}
_LOG_LINES = 12


@dataclass(frozen=True)
class Proof:
    """Proof of path: what is the same on every rank, and a table of the rest."""

    common: list[tuple[str, str]]
    head: list[str]
    rows: list[Markup]  # the cells of a row


@dataclass(frozen=True)
class Token:
    token: int
    logprob: str
    delta: str  # cell minus baseline; empty: not in the other side's top-k


@dataclass(frozen=True)
class SideBySide:
    prompt: str
    step: int
    position: int
    gap: str
    swapped: bool  # the best tokens differ
    rows: list[tuple[Token | None, Token | None]]


@dataclass(frozen=True)
class CellView:
    """All text of one cell's row and body. Facets are what the page filters by."""

    result: CellResult
    kind: str
    column: str
    anchor: str
    options: list[str]
    notes: list[str]
    meaning: str
    differs: bool
    rerun: str
    command: str
    facts: list[tuple[str, str]]
    proof: Proof | None
    statistics: list[tuple[str, str, str, str, Markup, str]]  # name, value, bound, n, drawing, note
    plot: Markup
    differences: list[SideBySide]
    phases: list[tuple[str, str, float]]  # name, seconds, share of all
    kv: str
    baseline: str  # fragment of the baseline's cell, if it is in this run
    log_end: str
    log_packed: str
    log_lines: int
    earlier: tuple[CellResult, ...]


def view(
    result: CellResult,
    kind: str,
    baseline: CellResult | None = None,
    earlier: tuple[CellResult, ...] = (),
    whole_log: bool = False,
) -> CellView:
    """`baseline` is the result that `result.baseline_id` names, where this run has it.

    `whole_log`: the caller compresses the body, so the log need not be compressed for itself.
    """
    cell = result.cell
    lines = clean(result.log_tail).rstrip().splitlines()
    whole = whole_log or len(lines) <= _LOG_LINES
    total = sum(phase.seconds for phase in result.phases)
    options, notes = _options(result)
    return CellView(
        result=result,
        kind=kind,
        column=column_of(cell),
        anchor=fragment(cell=cell.id),
        options=options,
        notes=notes,
        meaning=TABLE[result.verdict].sentence,
        differs=result.effect is Effect.DIFFERS,
        rerun=rerun(cell.id),
        command=result.command or cell.shown(),
        facts=_facts(result),
        proof=_proof(result.proof),
        statistics=[
            (
                statistic.name,
                f"{number(statistic.value)} {statistic.unit}".strip(),
                "none" if statistic.bound is None else f"{number(statistic.bound)} {statistic.unit}".strip(),
                f"{statistic.n:,}",
                drawing.against_bound(statistic),
                statistic.note,
            )
            for statistic in result.statistics
        ],
        plot=drawing.gaps(result.differences),
        differences=[_side_by_side(difference) for difference in result.differences],
        phases=[(phase.name, seconds(phase.seconds), _share(phase.seconds, total)) for phase in result.phases],
        kv=_kv(result, baseline),
        baseline=fragment(cell=baseline.cell.id) if baseline else "",
        log_end="\n".join(lines if whole else lines[-_LOG_LINES:]),
        log_packed="" if whole else packed("\n".join(lines)),
        log_lines=len(lines),
        earlier=earlier,
    )


def _share(part: float, total: float) -> float:
    """`part` of `total` as 0 to 1; 0 where the numbers make no sense."""
    return part / total if 0 <= part <= total and 0 < total < float("inf") else 0.0


def _options(result: CellResult) -> tuple[list[str], list[str]]:
    """What tells this cell from its neighbours of the same square: the layout, and the options in its id."""
    cell = result.cell
    options = [f"TP {cell.tp}"]
    if cell.kvp != 1:
        options += [f"KVP {cell.kvp}", f"TPA {cell.tpa}"] if cell.kvp > 0 else [f"KVP {cell.kvp}"]
        options += [cell.comm] if cell.comm else []
        options += [f"interleave {cell.interleave}"]
    shown = set(cell.id.split("/"))
    notes = [f"{name}={value}" for name, value in (*cell.serve, *cell.helix) if f"{name}={value}" in shown]
    return options, notes + ([f"planted defect: {cell.fault}"] if cell.fault else [])


def _facts(result: CellResult) -> list[tuple[str, str]]:
    cell = result.cell
    facts = [
        ("model", cell.model),
        ("hardware", f"{cell.hardware} ({result.hardware_name})" if result.hardware_name else cell.hardware),
        *result.versions,
        ("suites", ", ".join(result.suites) or "none"),
        ("workload", cell.workload),
        ("started", result.started or "not started"),
        ("attempts", str(result.attempts)),
        ("content key", cell.key),
    ]
    return facts + ([("transcript", result.transcript_digest)] if result.transcript_digest else [])


def _kv(result: CellResult, baseline: CellResult | None) -> str:
    if result.kv_cache_tokens is None:
        return ""
    said = f"{result.kv_cache_tokens:,} tokens"
    if baseline is None or baseline is result or not baseline.kv_cache_tokens:
        return said
    ratio = result.kv_cache_tokens / baseline.kv_cache_tokens
    return f"{said}: {ratio:.2f} × the baseline's {baseline.kv_cache_tokens:,}"


def _proof(ranks: tuple[dict, ...]) -> Proof | None:
    if not ranks:
        return None
    flat = []
    for rank in ranks:
        counters = rank.get("counters")
        own = {
            str(name): _word(value) for name, value in rank.items() if name != "counters" or not isinstance(value, dict)
        }
        flat.append({**own, **({str(n): _word(v) for n, v in counters.items()} if isinstance(counters, dict) else {})})
    named = {name for rank in flat for name in rank}
    names = [name for name in _PROOF if name in named] + sorted(named - _PROOF.keys())
    column = {name: [rank.get(name, "–") for rank in flat] for name in names}
    table = [name for name in names if name in _ALWAYS or len(set(column[name])) > 1]
    return Proof(
        common=[(_PROOF.get(name, name), column[name][0]) for name in names if name not in table],
        head=[_PROOF.get(name, name) for name in table],
        rows=[table_row([column[name][index] for name in table]) for index in range(len(flat))],
    )


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def _side_by_side(difference: Difference) -> SideBySide:
    gap = drawing.gap(difference)
    left = _tokens(difference.baseline, difference.candidate, sign=-1)
    right = _tokens(difference.candidate, difference.baseline, sign=1)
    height = max(len(left), len(right))
    pairs = zip(left + [None] * (height - len(left)), right + [None] * (height - len(right)), strict=True)
    return SideBySide(
        prompt=difference.prompt,
        step=difference.step,
        position=difference.position,
        gap="baseline's token is not in the cell's top-k" if gap is None else f"|Δ logprob| {number(gap)} nat",
        swapped=bool(left and right and left[0].token != right[0].token),
        rows=list(pairs),
    )


def _tokens(side: tuple[tuple[int, float], ...], other: tuple[tuple[int, float], ...], sign: int) -> list[Token]:
    there = dict(other)
    return [
        Token(token, f"{logprob:.4f}", f"{sign * (logprob - there[token]):+.4f}" if token in there else "")
        for token, logprob in side
    ]
