"""Which of several results of a cell counts, and what is missing.

**The rule.** A run that judged a cell counts before one that could not, and that before one that skipped it; among
equals the latest. Runs that asked the very same (`asked`) and judged differently make the cell `flaky`.
"""

from collections import defaultdict
from collections.abc import Sequence

from harness.frozen import Frozen
from harness.merge.source import Record, Source, few
from harness.plain import plural
from harness.verdict import Effect, Verdict

_SKIPPED = {Verdict.SKIP: "skipped", Verdict.STALE: "stale"}


class Joined(Frozen):
    """Events of the merged ledger, and what is to be said of it.

    `missing`: (id, run that planned it) without a result; `skipped`: why -> ids that no run ran; `overruled`: ids
    that an earlier run judged otherwise when asked something else (other hardware, versions or code).
    """

    expected: tuple[str, ...]
    got: int
    records: tuple[Record, ...]
    missing: tuple[tuple[str, str], ...]
    skipped: dict[str, tuple[str, ...]]
    overruled: tuple[str, ...]
    final: tuple[Record, ...]

    def lines(self, most: int = 20) -> list[str]:
        """What a reader must know, names included; at most `most` names of what is missing."""
        told = [f"expected {len(self.expected)}, got {self.got}"]
        told += [f"  missing: {cell_id} (planned by {run})" for cell_id, run in self.missing[:most]]
        told += [f"  … and {len(self.missing) - most} more" for _ in self.missing[most : most + 1]]
        told += [f"  {plural(len(ids), 'cell')} ran nowhere: {why}" for why, ids in self.skipped.items()]
        told += [f"  judged otherwise by an earlier run: {cell_id}" for cell_id in self.overruled[:most]]
        return told


def join(sources: Sequence[Source]) -> Joined:
    """`sources`, the oldest first, as one."""
    planned: dict[str, str] = {}
    for source in sources:
        for cell_id in source.expected:
            planned.setdefault(cell_id, source.name)
    by_hardware: dict[str, dict[str, None]] = defaultdict(dict)  # hardware -> runs that ran some cell on it
    seen: dict[str, list[tuple[str, Record]]] = {cell_id: [] for cell_id in planned}
    for source in sources:
        for cell_id, records in source.records.items():
            seen.setdefault(cell_id, []).extend((source.name, record) for record in records)
            if records[-1].result.effect is not Effect.NEUTRAL:
                by_hardware[records[-1].result.cell.hardware][source.name] = None
    written, final, overruled, skipped = [], [], [], defaultdict(list)
    for cell_id, found in seen.items():
        if not found:
            continue
        best = _best(found)
        others = [record for _, record in found if record is not best]
        if best.result.effect is Effect.NEUTRAL:
            last = _retold(best, best.result.verdict, _nowhere(found, by_hardware))
        else:
            last = _settled(best, found)
        written += [record for record in others if _worth_keeping(record, best)]
        written.append(last)
        final.append(last)
        if last.result.effect is Effect.NEUTRAL:
            skipped[last.result.reason].append(cell_id)
        elif last is best and any(_otherwise(record, best) for record in others):
            overruled.append(cell_id)
    return Joined(
        expected=tuple(seen),
        got=sum(record.result.effect is not Effect.NEUTRAL for record in final),
        records=tuple(written),
        missing=tuple((cell_id, planned[cell_id]) for cell_id, found in seen.items() if not found),
        skipped={reason: tuple(ids) for reason, ids in skipped.items()},
        overruled=tuple(overruled),
        final=tuple(final),
    )


def _best(found: Sequence[tuple[str, Record]]) -> Record:
    rank = {Effect.NEUTRAL: 0, Effect.INFRASTRUCTURE: 1}
    return max(enumerate(found), key=lambda one: (rank.get(one[1][1].result.effect, 2), one[0]))[1][1]


def _otherwise(record: Record, best: Record) -> bool:
    return record.judged and best.judged and record.result.verdict is not best.result.verdict


def _worth_keeping(record: Record, best: Record) -> bool:
    """Earlier results stay in the history; the same answer to the same question, as of a shard's baseline, does not."""
    same = (record.asked, record.result.verdict) == (best.asked, best.result.verdict)
    return record.result.effect is not Effect.NEUTRAL and not same


def _settled(best: Record, found: Sequence[tuple[str, Record]]) -> Record:
    alike = [(run, record) for run, record in found if best.asked and record.asked == best.asked and record.judged]
    if not best.judged or len({record.result.verdict for _, record in alike}) < 2:
        return best
    told = "; ".join(f"{record.result.verdict} in {run}: {record.result.reason}" for run, record in alike)
    return _retold(best, Verdict.FLAKY, f"runs disagree: {told}")


def _nowhere(found: Sequence[tuple[str, Record]], by_hardware: dict[str, dict[str, None]]) -> str:
    """Why no run ran a cell: in whose words, and who might have but did not plan it."""
    reasons: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for run, record in found:
        reasons[_SKIPPED[record.result.verdict], record.result.reason][run] = None
    told = [f"{word} in {few(list(runs))} ({reason})" for (word, reason), runs in reasons.items()]
    hardware = found[0][1].result.cell.hardware
    able = by_hardware.get(hardware, {})
    if not able:
        told.append(f"no run ran a cell on {hardware}")
    elif not any(run in able for run, _ in found):
        told.append(f"not planned by {few(list(able))}, which ran others on {hardware}")
    return "; ".join(told)


def _retold(record: Record, verdict: Verdict, reason: str) -> Record:
    event = {**record.event, "result": {**record.event["result"], "verdict": str(verdict), "reason": reason}}
    result = record.result.model_copy(update={"verdict": verdict, "reason": reason})
    return Record(event=event, result=result, asked=record.asked)
