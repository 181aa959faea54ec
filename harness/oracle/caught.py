"""What the oracle said of the deliberate defects: `python -m harness faults RUN… [--json FILE] [--markdown FILE]`.

RUNs are folders of runs (`./test_helix.sh --suite faults`). One row a defect and cell: was it caught, by which
statistic, at what effect size (value / bound), or by the proof of path alone. A cell that ran twice counts last.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from harness.frozen import Frozen
from harness.ledger import find, read, results
from harness.result import CellResult, Statistic
from harness.verdict import CAUGHT, Verdict

PROOF = "proof of path"
DEATH = "failed self-test, or two deaths while answering"
_NOT_RUN = (Verdict.SKIP, Verdict.STALE)


class Row(Frozen):
    """One defect in one cell. `statistic`, `value`, `bound` of the statistic that is furthest beyond its bound.

    `effect`: see `effect`, None where the bound is 0 or nothing is beyond; `beyond`: names of all that are beyond.
    `over_point`: the largest logprob change, over the 99.9 % point of the largest that a clean cell of as many steps
    has: above 1 the defect changes some output by more than rounding does in 999 of 1,000 cells. None where nothing was
    compared. `how`: the verdict's own sentence.
    """

    fault: str
    cell: str
    mode: str
    layout: str
    verdict: Verdict
    declared: Verdict
    caught: bool
    statistic: str = ""
    value: float | None = None
    bound: float | None = None
    effect: float | None = None
    over_point: float | None = None
    beyond: tuple[str, ...] = ()
    how: str = ""
    why: str = ""


class Table(Frozen):
    """All rows, and what the judged cells without a defect of the same runs said."""

    rows: tuple[Row, ...]
    clean: int
    alarms: int
    bands: tuple[str, ...]


def effect(statistic: Statistic) -> float:
    """How far beyond: value / bound, of a KL its root, since a KL grows with the square of a change.

    A bound of 0 (a missing answer, a lost token) counts by the value itself.
    """
    if not statistic.bound:
        return statistic.value
    ratio = statistic.value / statistic.bound
    return math.sqrt(ratio) if "KL" in statistic.name else ratio


def over_point(result: CellResult) -> float | None:
    """The largest logprob change of prefill or decode over the null's 99.9 % point of it, whichever is more."""
    largest = [item for item in result.statistics if item.name.endswith("largest logprob change") and item.null]
    return max((item.value / item.null for item in largest), default=None)


def row(result: CellResult) -> Row:
    """The row of a cell with a defect."""
    cell = result.cell
    beyond = [item for item in result.statistics if item.bound is not None and not item.value <= item.bound]
    parts = [f"TP{cell.tp}/DCP{cell.kvp}", f"i{cell.interleave}", cell.comm or "", _served(result)]
    common = {
        "fault": cell.fault, "cell": cell.id, "mode": str(cell.mode), "layout": " ".join(filter(None, parts)),
        "verdict": result.verdict, "declared": result.declared, "caught": _caught(result, beyond),
        "over_point": over_point(result), "how": result.reason,
        "why": result.declared_why if result.declared is not Verdict.FAIL else "",
    }  # fmt: skip
    if not beyond:
        return Row(**common, statistic={Verdict.UNPROVEN: PROOF, Verdict.FAIL: DEATH}.get(result.verdict, ""))
    worst = max((item for item in beyond if item.bound), key=effect, default=beyond[0])
    return Row(
        **common,
        statistic=worst.name,
        value=worst.value,
        bound=worst.bound,
        effect=effect(worst) if worst.bound else None,
        beyond=tuple(item.name for item in beyond),
    )


def _caught(result: CellResult, beyond: list[Statistic]) -> bool:
    """By the verdict; where a suite declares the defect `xfail`, by a statistic that is beyond its bound."""
    return result.verdict in CAUGHT or (result.verdict is Verdict.XFAIL and bool(beyond))


def _served(result: CellResult) -> str:
    """What tells cells with the same defect apart: dtype, options that make a second chunk, a hit or a preemption."""
    serve = {name: value for name, value in result.cell.serve if (name, value) != ("dtype", "float32")}
    told = {"dtype": "{}", "max-num-batched-tokens": "chunks of {}", "num-gpu-blocks-override": "{} blocks"}
    return ", ".join(text.format(serve[name]) for name, text in told.items() if name in serve)


def rows_of(results: Sequence[CellResult]) -> tuple[Row, ...]:
    """The rows of the cells with a defect that ran: what was not caught first, then by mode and name."""
    rows = [row(result) for result in results if result.cell.fault and result.verdict not in _NOT_RUN]
    return tuple(sorted(rows, key=lambda item: (item.caught, item.mode, item.fault, item.cell)))


def table(runs: Sequence[Path]) -> Table:
    """The table of all `runs`. OSError where one has no ledger."""
    found: dict[str, CellResult] = {}
    for run in runs:
        events, _ = read(find(run))
        found |= {result.cell.key: result for result in results(events)}
    judged = [result for result in found.values() if result.verdict not in _NOT_RUN]
    clean = [result for result in judged if not result.cell.fault and result.statistics]
    return Table(
        rows=rows_of(judged),
        clean=len(clean),
        alarms=sum(result.verdict is Verdict.FAIL for result in clean),
        bands=tuple(dict.fromkeys(result.band for result in judged if result.band)),
    )


INTRO = """\
# Deliberate defects

The oracle's own test. Each defect is put into real workers by name (`additional_config={"helix": {"fault": "NAME"}}`;
[`fault_merge.py`](../helix_runtime/vllm_plugin/fault_merge.py),
[`fault_cache.py`](../helix_runtime/vllm_plugin/fault_cache.py)), and its cell must come out as `fail` or `unproven`.
`NAME:WHEN` strikes in some calls only: in a batch or of one request (`batch`, `single`), in decode or prefill
(`decode`, `prefill`; a prompt of one token is a decode here), after a prefix hit or in a second chunk (`prefix`), in
one layer, on one rank of each group, in every Kth attention call, for one query head, for the tokens at every Nth
position, or beyond N tokens.

    ./test_helix.sh --suite faults                            # exit status 1 where one is not caught
    python -m harness faults RUN --markdown docs/faults.md    # this page, from the folder of that run

"value" is that of the statistic furthest beyond its bound (value / bound, of a KL its root), "statistics beyond" how
many are. "over the point" is the largest logprob change over the 99.9 % point of the largest that a clean cell with as
many steps has, which one clean cell in a thousand exceeds: above 1, the defect changes some output by more than
rounding does. What statistics and bounds mean, and how often right servers alarm, is in [oracle.md](oracle.md). The
ledger behind the committed table, and more on what was not caught, is in
[reports/2026-11-26-faults](../reports/2026-11-26-faults/README.md).
"""


def markdown(made: Table) -> str:
    """The page for docs and reports: what was not caught first, then all rows, then what each defect does."""
    from helix_runtime.vllm_plugin.faults import describe

    names = {item.fault.partition(":")[0] for item in made.rows}
    missed = [item for item in made.rows if not item.caught]
    loud = [item for item in made.rows if (item.over_point or 0) > 1]
    lines = [
        INTRO,
        "## The table",
        "",
        f"{len(made.rows)} cells with one of {len(names)} defects ({len({item.fault for item in made.rows})} counting "
        f"conditions): {len(made.rows) - len(missed)} caught, {len(missed)} not. "
        f"{made.clean} cells without a defect in the same runs: {made.alarms} alarms. "
        f"{len(loud)} of the {sum(item.over_point is not None for item in made.rows)} cells whose run told the null's "
        f"99.9 % point change some output by more than that; {sum(item.caught for item in loud)} of these are caught. "
        "Judged by:",
        "",
        *(f"- {band}" for band in made.bands),
        "",
    ]
    if missed:
        lines += ["Not caught, and why:", ""]
        lines += [f"- `{item.fault}`, {item.mode} {item.layout}: {item.why or item.how}" for item in missed]
        lines += [""]
    lines += [
        "| defect | cell | caught by | value | bound | value / bound | over the point | statistics beyond |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in made.rows:
        by = item.statistic or f"**not caught** ({item.verdict})"
        numbers = [*map(_number, (item.value, item.bound, item.effect, item.over_point)), str(len(item.beyond) or "–")]
        lines.append(f"| `{item.fault}` | {item.mode} {item.layout} | {by} | {' | '.join(numbers)} |")
    lines += ["", "## What each defect does", ""]
    lines += [f"- `{name}`: {describe(name)}" for name in sorted(names)]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when a defect that is declared to be caught was not."""
    parser = argparse.ArgumentParser(prog="python -m harness faults", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write it there instead of printing it")
    options = parser.parse_args(argv)
    try:
        made = table(options.runs)
    except OSError as error:
        parser.error(f"no run: {error.filename}; name folders that ./test_helix.sh --suite faults has written")
    if options.json:
        options.json.write_text(made.model_dump_json(indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(made) + "\n")
    else:
        print(markdown(made))
    return int(any(item.declared is Verdict.FAIL and not item.caught for item in made.rows))
