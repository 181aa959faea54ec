"""Two runs, cell by cell: what moved, ranked; what is new, gone, or says nothing, with the reason.

**The rule.** Cells meet by id. A cell that both runs judged (`ok` or `differs`) has moved when its verdict or its
declaration changed. Movers are ranked by what a reader must act on:

1. `worse`: was as declared, differs now; the worst verdict first
2. `xpass`: a known limitation is gone
3. `other`: differs as before, by another verdict
4. `better`: differed, is as declared now
5. `declared`: as declared in both, but declared otherwise

A cell with the same verdict whose numbers moved is listed apart, the largest change first. A cell that one run skipped,
or that broke for reasons outside Helix, is excluded: the pair says nothing about it.
"""

import math
from collections.abc import Iterable
from enum import StrEnum

from harness.frozen import Frozen
from harness.report.naming import Name, name_of
from harness.report.square import severity
from harness.report.store import Stored, connect
from harness.report.text import number, seconds
from harness.verdict import Effect, Verdict

#: A number has moved when it changed by this factor; KV capacity is exact, times on shared hosts are not.
_FACTORS = {"kv_cache_tokens": 1.01, "nearness": 2.0, "seconds": 1.5}
_LEAST_SECONDS = 5.0
_LEAST_NEARNESS = 0.1


class Direction(StrEnum):
    WORSE = "worse"
    XPASS = "xpass"
    OTHER = "other"
    BETTER = "better"
    DECLARED = "declared"


TITLES = {
    Direction.WORSE: "Worse",
    Direction.XPASS: "XPASS: a known limitation is gone; update the declared table",
    Direction.OTHER: "Wrong in another way",
    Direction.BETTER: "Better",
    Direction.DECLARED: "Declared otherwise",
}


class Standing(Frozen):
    """What one run says of one cell: a row of `harness.report.table`, cut down."""

    id: str
    key: str
    kind: str
    column: str
    backend: str
    hardware: str
    model: str
    tp: int
    kvp: int
    tpa: int | None
    comm: str
    interleave: int
    fault: str
    declared: Verdict
    verdict: Verdict
    effect: Effect
    reason: str
    versions: str
    command: str
    kv_cache_tokens: float | None
    seconds: float | None
    nearness: float | None

    @property
    def name(self) -> Name:
        return name_of(
            self.id, self.column, self.backend, self.hardware, self.model, self.tp, self.kvp, self.tpa, self.comm,
            self.interleave, self.fault,
        )  # fmt: skip

    @property
    def judged(self) -> bool:
        return self.effect in (Effect.OK, Effect.DIFFERS)


class Move(Frozen):
    """One cell that both runs judged, and differently. `asked`: what was asked otherwise, in words."""

    direction: Direction
    before: Standing
    after: Standing
    asked: tuple[str, ...]


class NumberMove(Frozen):
    """One number of a cell whose verdict stayed. `factor`: after / before."""

    after: Standing
    name: str
    was: str
    now: str
    factor: float


class Excluded(Frozen):
    """Cells of which the pair says nothing, all for the same reason."""

    reason: str
    cells: tuple[str, ...]
    broken: bool  # judged before, and now broken by something outside Helix: worth a look

    @property
    def count(self) -> int:
        return len(self.cells)


class Comparison(Frozen):
    """`before` and `after` are the runs; `same` counts the cells that both judged and that stand as they stood."""

    before: Stored
    after: Stored
    movers: tuple[Move, ...]
    numbers: tuple[NumberMove, ...]
    new: tuple[Standing, ...]
    gone: tuple[Standing, ...]
    gone_why: str
    excluded: tuple[Excluded, ...]
    same: int

    def of(self, direction: Direction) -> tuple[Move, ...]:
        return tuple(move for move in self.movers if move.direction is direction)

    @property
    def sentence(self) -> str:
        """The comparison in one line: `1 worse, 2 better, 3 new; 40 as before`."""
        words = {
            Direction.WORSE: "worse",
            Direction.XPASS: "known limitation gone",
            Direction.OTHER: "wrong in another way",
            Direction.BETTER: "better",
            Direction.DECLARED: "declared otherwise",
        }
        said = [f"{len(self.of(direction))} {word}" for direction, word in words.items() if self.of(direction)]
        broken = sum(len(one.cells) for one in self.excluded if one.broken)
        said += [f"{broken} could no longer be judged"] if broken else []
        for word, found in (("new", self.new), ("gone", self.gone)):
            judged = sum(one.judged for one in found)
            said += (
                [f"{len(found):,} {word}{'' if judged == len(found) else f', {judged:,} of them judged'}"]
                if found
                else []
            )
        said = said or ["no verdict changed"]
        return f"{', '.join(said)}; {self.same} as before"


def standings(run: Stored) -> dict[str, Standing]:
    """Every cell of a run, from its Parquet file."""
    names = list(Standing.model_fields)
    columns = ", ".join(f'"{name}"' for name in names)  # `column` is a word of SQL
    query = f"SELECT {columns} FROM read_parquet($file)"
    rows = connect().execute(query, {"file": str(run.file)}).fetchall()
    found = [Standing(**dict(zip(names, row, strict=True))) for row in rows]
    return {one.id: one for one in found}


def compare(before: Stored, after: Stored) -> Comparison:
    """What changed from one run to the other, by this module's rule."""
    old, new = standings(before), standings(after)
    both = [cell_id for cell_id in new if cell_id in old]
    judged = [cell_id for cell_id in both if old[cell_id].judged and new[cell_id].judged]
    movers = [move for cell_id in judged if (move := _move(old[cell_id], new[cell_id]))]
    moved = {move.after.id for move in movers}
    numbers = [one for cell_id in judged if cell_id not in moved for one in _numbers(old[cell_id], new[cell_id])]
    gone = _judged_first(one for cell_id, one in old.items() if cell_id not in new)
    return Comparison(
        before=before,
        after=after,
        movers=tuple(sorted(movers, key=_rank)),
        numbers=tuple(sorted(numbers, key=lambda one: -abs(math.log(one.factor)))),
        new=_judged_first(one for cell_id, one in new.items() if cell_id not in old),
        gone=gone,
        gone_why=_gone_why(gone, after),
        excluded=_excluded(old, new, both),
        same=len(judged) - len(moved),
    )


def _move(before: Standing, after: Standing) -> Move | None:
    if (before.verdict, before.declared) == (after.verdict, after.declared):
        return None
    was, now = before.effect is Effect.DIFFERS, after.effect is Effect.DIFFERS
    if now and after.verdict is Verdict.XPASS:
        direction = Direction.XPASS
    elif now:
        direction = Direction.OTHER if was else Direction.WORSE
    else:
        direction = Direction.BETTER if was else Direction.DECLARED
    return Move(direction=direction, before=before, after=after, asked=_asked(before, after))


def _rank(move: Move) -> tuple[int, int, str]:
    place = list(Direction).index(move.direction)
    return place, severity(move.after.declared, move.after.verdict), move.after.id


def _asked(before: Standing, after: Standing) -> tuple[str, ...]:
    """What was asked otherwise of a cell with the same id: versions, options, or something that only the key shows."""
    said = _words("", before.versions.split("; "), after.versions.split("; "))
    said += _words("command: ", before.command.split(), after.command.split())
    return tuple(said or (["content key"] if before.key != after.key else []))


def _words(label: str, old: list[str], new: list[str]) -> list[str]:
    was, now = [one for one in old if one and one not in new], [one for one in new if one and one not in old]
    return [f"{label}{' '.join(was) or 'nothing'} → {' '.join(now) or 'nothing'}"] if was or now else []


def _numbers(before: Standing, after: Standing) -> Iterable[NumberMove]:
    pairs = (
        ("KV cache tokens", "kv_cache_tokens", 0.0, number),
        ("largest statistic / bound", "nearness", _LEAST_NEARNESS, number),
        ("time", "seconds", _LEAST_SECONDS, seconds),
    )
    for label, field, least, shown in pairs:
        was, now = getattr(before, field), getattr(after, field)
        if not (was and now and 0 < was < math.inf and 0 < now < math.inf) or max(was, now) < least:
            continue
        if field == "seconds" and abs(now - was) < least:
            continue
        if max(was / now, now / was) >= _FACTORS[field]:
            yield NumberMove(after=after, name=label, was=shown(was), now=shown(now), factor=now / was)


def _excluded(old: dict[str, Standing], new: dict[str, Standing], both: list[str]) -> tuple[Excluded, ...]:
    groups: dict[tuple[bool, str], list[str]] = {}
    for cell_id in both:
        before, after = old[cell_id], new[cell_id]
        if before.judged and after.judged:
            continue
        if before.judged:
            why = f"{after.verdict} now: {after.reason}"
        elif after.judged:
            why = f"{before.verdict} before: {before.reason}"
        elif (before.verdict, before.reason) == (after.verdict, after.reason):
            why = f"{after.verdict} in both: {after.reason}"
        else:
            why = f"{before.verdict} before ({before.reason}), {after.verdict} now: {after.reason}"
        broken = before.judged and after.effect is Effect.INFRASTRUCTURE
        groups.setdefault((not broken, why), []).append(cell_id)
    return tuple(
        Excluded(reason=why, cells=tuple(cells), broken=not quiet)
        for (quiet, why), cells in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]), group[0][1]))
    )


def _judged_first(found: Iterable[Standing]) -> tuple[Standing, ...]:
    return tuple(sorted(found, key=lambda one: not one.judged))


def _gone_why(gone: tuple[Standing, ...], after: Stored) -> str:
    lost = len({one.id for one in gone} & set(after.header.unfinished))
    if not gone:
        return ""
    if lost == len(gone):
        return "planned, but without a result"
    return f"{lost} planned, but without a result; the others not asked for" if lost else "not asked for"
