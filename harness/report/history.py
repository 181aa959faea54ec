"""Many runs at once: what each cell said in every run of the ledger folder, its last good and its first bad run.

The cells of all runs are one table that DuckDB reads from the runs' Parquet files (`harness.report.store`).
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd
from pydantic import Field

from harness import ledger
from harness.frozen import Frozen
from harness.report.naming import Name, name_of
from harness.report.store import Stored, connect, stored
from harness.verdict import Effect, Verdict

#: A run's cells with `place`, its number among the runs, the oldest first.
_CELLS = """
    SELECT place, folder, cells.* EXCLUDE (filename)
    FROM read_parquet($files, union_by_name = true, filename = true) AS cells
    JOIN (
        SELECT unnest($files) AS filename, unnest($folders) AS folder, unnest(range(len($files))) AS place
    ) USING (filename)
"""
#: Good and bad are about Helix: what was skipped, went stale or broke for another reason says neither.
_TRACKS = """
    WITH seen AS (SELECT * FROM cells WHERE id GLOB $glob),
    good AS (SELECT id, max(place) AS last_good FROM seen WHERE effect = 'ok' GROUP BY id)
    SELECT id,
        list(place ORDER BY place) AS places,
        list(verdict ORDER BY place) AS verdicts,
        arg_max(declared, place) AS declared,
        any_value(last_good) AS last_good,
        min(place) FILTER (effect = 'differs' AND verdict <> 'xpass' AND place > coalesce(last_good, -1)) AS first_bad,
        min(place) FILTER (verdict = 'xpass' AND place > coalesce(last_good, -1)) AS gone,
        count(DISTINCT verdict) FILTER (effect IN ('ok', 'differs')) AS kinds,
        arg_max(struct_pack("column", backend, hardware, model, tp, kvp, tpa, comm, interleave, fault), place) AS named,
        arg_max(suites, place) AS suites
    FROM seen LEFT JOIN good USING (id) GROUP BY id
    ORDER BY gone IS NULL, first_bad IS NULL, kinds DESC, id
"""


class Track(Frozen):
    """One cell over the runs. Numbers are places in `History.runs`.

    `last_good` is the last run whose verdict was as declared; `first_bad` the first one after it whose verdict
    differed, None while the cell is good. `gone` is the first one after it that found a known limitation gone: that
    is news, and nothing bad.
    """

    id: str
    name: Name = Field(exclude=True)
    verdicts: tuple[tuple[int, Verdict], ...]  # (run, verdict), oldest first; only runs that had the cell
    declared: Verdict  # in its last run
    last_good: int | None
    first_bad: int | None
    gone: int | None
    changed: bool  # two judged verdicts differ
    suites: tuple[str, ...] = Field(default=(), exclude=True)  # as of its last run

    @property
    def news(self) -> bool:
        """Its verdict changed over the runs, or differs from the declared now."""
        return self.changed or self.first_bad is not None or self.gone is not None


class History(Frozen):
    runs: tuple[Stored, ...]  # oldest first
    tracks: dict[str, Track]


def find_runs(reports: Path) -> list[Stored]:
    """The runs in `reports/*/` and `reports/runs/*/`, oldest first; folders without a ledger are no runs."""
    folders = [path for base in (reports, reports / "runs") if base.is_dir() for path in sorted(base.iterdir())]
    found = [stored(folder) for folder in folders if ledger.find(folder).is_file()]
    return sorted(found, key=lambda one: (one.header.started, one.header.run))


def frame(runs: Sequence[Stored]) -> pd.DataFrame:
    """All cells of `runs`, a row a cell and run: the columns of `harness.report.table`, `place` and `folder` first."""
    if not runs:
        return pd.DataFrame()
    return _ask("SELECT * FROM cells ORDER BY place, id", runs).df()


def tracks(runs: Sequence[Stored], glob: str = "*") -> History:
    """Every cell whose id matches `glob`, over `runs`."""
    rows = _ask(_TRACKS, runs, glob=glob).fetchall() if runs else []
    found = {
        cell_id: Track(
            id=cell_id,
            name=name_of(cell_id, **named),
            verdicts=tuple((place, Verdict(word)) for place, word in zip(places, verdicts, strict=True)),
            declared=Verdict(declared),
            last_good=last_good,
            first_bad=first_bad,
            gone=gone,
            changed=kinds > 1,
            suites=tuple((suites or "").split()),
        )
        for cell_id, places, verdicts, declared, last_good, first_bad, gone, kinds, named, suites in rows
    }
    return History(runs=tuple(runs), tracks=found)


def seconds_by_cell(runs: Sequence[Stored]) -> dict[str, float]:
    """How long each cell took when it last ran, in seconds."""
    if not runs:
        return {}
    query = "SELECT id, arg_max(seconds, place) FROM cells WHERE seconds > 0 AND isfinite(seconds) GROUP BY id"
    return dict(_ask(query, runs).fetchall())


def previous(runs: Sequence[Stored], folder: Path) -> Stored | None:
    """The run that `folder` is best compared with: of the earlier runs that judged at least half as many of its judged
    cells as the one that judged most of them, the latest. None where no earlier run judged any."""
    names = [one.folder.resolve() for one in runs]
    here = names.index(folder.resolve()) if folder.resolve() in names else len(runs)
    if not 0 < here < len(runs):
        return None
    query = f"""
        WITH judged AS (SELECT place, id FROM cells WHERE effect IN ('{Effect.OK}', '{Effect.DIFFERS}'))
        SELECT place, count(*) FROM judged WHERE place < $here AND id IN (SELECT id FROM judged WHERE place = $here)
        GROUP BY place
    """
    shared = dict(_ask(query, runs, here=here).fetchall())
    enough = [place for place, count in shared.items() if count * 2 >= max(shared.values())]
    return runs[max(enough)] if enough else None


def _ask(query: str, runs: Sequence[Stored], **parameters: object) -> duckdb.DuckDBPyConnection:
    """Run `query` over the table `cells` of `runs`, which are oldest first."""
    files, folders = [str(one.file) for one in runs], [str(one.folder) for one in runs]
    connection = connect()
    connection.execute(f"CREATE TEMP TABLE cells AS {_CELLS}", {"files": files, "folders": folders})
    return connection.execute(query, parameters)
