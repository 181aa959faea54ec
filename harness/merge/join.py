"""Which of several results of a cell counts, and what is missing.

**The rule.** A run that judged a cell counts before one that could not, and that before one that skipped it; among
equals the latest. Runs that asked the very same (`asked`) and judged differently make the cell `flaky`.
"""

from collections import defaultdict
from collections.abc import Sequence

from harness.frozen import Frozen
from harness.merge.source import Record, Source
from harness.verdict import Effect, Verdict


class Joined(Frozen):
    """Events of the merged ledger, and what is to be said of it.

    `missing`: (id, run that planned it) without a result; `skipped`: reason -> ids that no run ran; `overruled`: ids
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
        told += [f"  {len(ids)} skipped everywhere: {reason}" for reason, ids in self.skipped.items()]
        told += [f"  judged otherwise by an earlier run: {cell_id}" for cell_id in self.overruled[:most]]
        return told


def join(sources: Sequence[Source]) -> Joined:
    """`sources`, the oldest first, as one."""
    planned: dict[str, str] = {}
    for source in sources:
        for cell_id in source.expected:
            planned.setdefault(cell_id, source.name)
    seen: dict[str, list[tuple[str, Record]]] = {cell_id: [] for cell_id in planned}
    for source in sources:
        for cell_id, records in source.records.items():
            seen.setdefault(cell_id, []).extend((source.name, record) for record in records)
    written, final, overruled, skipped = [], [], [], defaultdict(list)
    for cell_id, found in seen.items():
        if not found:
            continue
        best = _best(found)
        others = [record for _, record in found if record is not best]
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
    changed = {"verdict": str(Verdict.FLAKY), "reason": f"runs disagree: {told}"}
    event = {**best.event, "result": {**best.event["result"], **changed}}
    result = best.result.model_copy(update={"verdict": Verdict.FLAKY, "reason": changed["reason"]})
    return Record(event=event, result=result, asked=best.asked)
