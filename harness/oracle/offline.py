"""`python -m harness judge BASELINE.json CANDIDATE.json`: judges two saved transcripts, of any engine.

Both follow `harness/schemas/transcript-v1.json`. A run of the harness saves them in its folder, as
`cells/CELL/transcript.json`, the prompts beside them as `workload.json`, and the null bands as `bands/KEY.json`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.oracle.band import RUN_RATE, Band, measured_elsewhere, shipped
from harness.oracle.calibrate import NullPair, calibrate
from harness.oracle.judge import Judgement, judge
from harness.oracle.texts import with_texts
from harness.plain import quoted
from harness.result import Difference, Statistic
from harness.transcript import Transcript
from harness.verdict import Verdict

AGREE, DIFFERS, USAGE = 0, 1, 2

EPILOG = """\
the null band, the first of these that is there:
  --band FILE                     a band that a run or --save-band wrote
  --null FILE                     measured now: BASELINE against other transcripts of standard TP on the same prompts
  RUN/bands/KEY.json              where BASELINE is RUN/cells/CELL/transcript.json
  harness/oracle/null/*.json      shipped, by dtype and kind of model

exit status:
  0 the answers agree within the band   1 they differ, or nothing proves more than agreement up to where they part
  2 a file cannot be used, or no band is known
"""


class CannotJudge(ValueError):
    """The files cannot be judged; the text says why and what can be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Judge as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harness judge",
        description="Judge the transcript of one engine by that of another, step by step, against a null band.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("baseline", type=Path, metavar="BASELINE.json", help="a transcript of standard TP")
    parser.add_argument("candidate", type=Path, metavar="CANDIDATE.json", help="one that followed its tokens")
    parser.add_argument("--band", type=Path, metavar="FILE")
    parser.add_argument("--null", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--save-band", type=Path, metavar="FILE", help="write the band that was used")
    parser.add_argument("--model", help="the model, where the baseline's cell id does not name it")
    parser.add_argument(
        "--cells", type=int, default=1, metavar="N", help="judge as one of N cells of a run (default 1)"
    )
    parser.add_argument(
        "--rate", type=float, default=RUN_RATE, help=f"false-alarm rate of the whole run (default {RUN_RATE})"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    if not 0 < options.rate < 1 or options.cells < 1:
        parser.error("--rate lies between 0 and 1, --cells is at least 1")
    try:
        baseline, candidate = _read(options.baseline), _read(options.candidate)
        band = _band(options, baseline)
        found = judge(baseline, candidate, band, cells=options.cells, rate=options.rate)
        told = with_texts(found.differences, options.model or _model(baseline.cell_id))
        found = found.model_copy(update={"differences": told})
        if options.save_band:
            band.save(options.save_band)
    except (OSError, ValueError) as problem:
        print(f"cannot judge: {problem}", file=sys.stderr)
        return USAGE
    verdict = verdict_of(found)
    print(as_json(verdict, found) if options.format == "json" else as_text(verdict, found))
    return AGREE if verdict is Verdict.PASS else DIFFERS


def verdict_of(found: Judgement) -> Verdict:
    """`pass` says that the answers agree: two files prove no path. Without imposed tokens it is `unproven` at best."""
    if not found.agree:
        return Verdict.FAIL
    return Verdict.PASS if found.forced else Verdict.UNPROVEN


def _read(path: Path) -> Transcript:
    try:
        return Transcript.load(path)
    except ValueError as problem:
        errors = getattr(problem, "errors", lambda: [])()
        where = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors[:3])
        raise CannotJudge(f"{path} is no transcript: {where}; the format: harness/schemas/transcript-v1.json") from None


def _band(options: argparse.Namespace, baseline: Transcript) -> Band:
    if options.band:
        try:
            return Band.load(options.band)
        except ValueError:
            raise CannotJudge(f"{options.band} is no null band; runs keep theirs in RUN/bands") from None
    model = options.model or _model(baseline.cell_id)
    if options.null:
        pairs = [NullPair("given", baseline, _read(path)) for path in options.null]
        spread, shapes = measured_elsewhere(baseline.dtype, model)
        return calibrate(pairs, name="measured now", model=model, spread=spread, shapes=shapes)
    above = options.baseline.resolve().parents
    beside = above[min(2, len(above) - 1)] / "bands" / f"{baseline.cell_key}.json"
    if beside.is_file():
        return Band.load(beside)
    try:
        return shipped(baseline.dtype, model)
    except KeyError as problem:
        raise CannotJudge(f"{problem.args[0]}; give --null or --band") from None


def _model(cell_id: str) -> str:
    """The model's name out of a cell id (`cpu/standard-tp/CPU_ATTN/llama-k4/tp4/…`); recipes stand there bare."""
    parts = cell_id.split("/")
    name = parts[3] if len(parts) > 4 else ""
    return name.replace("--", "/") if "--" in name else f"recipe:{name}"


def as_json(verdict: Verdict, found: Judgement) -> str:
    return json.dumps({"verdict": str(verdict), **found.model_dump(mode="json")}, indent=1)


def as_text(verdict: Verdict, found: Judgement) -> str:
    """The verdict, why, and every statistic: value, bound, 95 % interval, the null's own value, n."""
    lines = [f"{verdict}: {found.reason}", found.band, ""]
    rows = [("statistic", "value", "bound", "95 % interval", "null", "n"), *map(_row, found.statistics)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    marks = [" ", *("✗" if item.name in found.beyond else " " for item in found.statistics)]
    for mark, row in zip(marks, rows, strict=True):
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"{mark} {'  '.join(cells)}".rstrip())
    for difference in found.differences:
        lines += [
            "",
            f"prompt {difference.prompt}, step {difference.step}, position {difference.position}",
            f"  baseline   {_tokens(difference.baseline, difference)}",
            f"  candidate  {_tokens(difference.candidate, difference)}",
        ]
    return "\n".join(lines)


def _row(item: Statistic) -> tuple[str, ...]:
    interval = "" if item.low is None or item.high is None else f"{item.low:.3g} – {item.high:.3g}"
    return (
        item.name,
        f"{item.value:.3g} {item.unit}",
        "" if item.bound is None else f"{item.bound:.3g}",
        interval,
        "" if item.null is None else f"{item.null:.3g}",
        str(item.n),
    )


def _tokens(top: Sequence[tuple[int, float]], difference: Difference) -> str:
    said = {token: f" {quoted(text)}" for token, text in difference.texts}
    return "  ".join(f"{token}{said.get(token, '')}: {logprob:.5f}" for token, logprob in top)
