"""The compatibility matrix: which cells stand behind a square, and what they say together.

**The rule.** A square shows the worst verdict among its cells, where "worst" is what a reader must know first:

1. what differs from the declared: `fail`, `flaky`, `rejected` that nobody declared, `unproven`, `xpass`;
2. what is as declared and was seen to run: `xfail`, then `pass`;
3. `error`: an infrastructure error says nothing about Helix, so it hides no verdict, but no refusal hides it;
4. `rejected` as declared;
5. what was not run: `stale`, then `skip`.

So five `pass` and one declared refusal (an illegal layout, say) are a `pass` with a note, as are twelve `pass` and one
`error`; a square of nothing but declared refusals is `rejected`, and one `fail` among fifty is a `fail`. The declared
verdict beside it is that of the cells that decided. A square disagrees if any of its cells differs from its own
declaration. In lists of cells an error comes right after what differs: there it is a thing to act on.
Cells with a planted defect test the oracle, not Helix: they are in the list of cells, not in the matrix.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Literal, Self

import pandas as pd

from harness.cell import Cell, Mode
from harness.frozen import Frozen
from harness.report.text import fragment, plural
from harness.result import CellResult
from harness.verdict import Effect, Verdict, effect_of

KINDS = ("GQA", "MLA")
COLUMNS = ("Standard TP", "Standard DCP", "Helix")
HARDWARE = ("cpu", "hopper", "blackwell", "blackwell-rtx")

_COLUMN = {
    Mode.STANDARD_TP: "Standard TP",
    Mode.STANDARD_DCP: "Standard DCP",
    Mode.HELIX_GQA: "Helix",
    Mode.HELIX_MLA: "Helix",
}
# A deliberate defect differs when it passes, and is as declared when it fails or is unproven.
_DIFFERING = (Verdict.PASS, Verdict.FAIL, Verdict.FLAKY, Verdict.REJECTED, Verdict.UNPROVEN, Verdict.XPASS)
_OTHERS = (
    Verdict.ERROR, Verdict.XFAIL, Verdict.FAIL, Verdict.UNPROVEN, Verdict.PASS, Verdict.REJECTED, Verdict.STALE,
    Verdict.SKIP,
)  # fmt: skip
#: Names of models with a latent KV cache, for a standard cell whose backend vLLM chooses.
_MLA_NAMES = ("deepseek-v2", "deepseek-v3", "deepseek-r1", "kimi-k2", "mla")


#: What is as declared and comes before an error in a square: all that an error may not hide.
_SEEN = len(_DIFFERING) + _OTHERS.index(Verdict.PASS)


@cache
def severity(declared: Verdict, observed: Verdict) -> int:
    """What a reader of a list must see first; the smallest first."""
    if effect_of(declared, observed) is Effect.DIFFERS:
        return _DIFFERING.index(observed)
    return len(_DIFFERING) + _OTHERS.index(observed)


def _rank(result: CellResult) -> float:
    """Place in this module's rule; the smallest decides a square."""
    error = result.verdict is Verdict.ERROR
    return _SEEN + 0.5 if error else severity(result.declared, result.verdict)


def latent_models(cells: Iterable[Cell]) -> frozenset[str]:
    """Models that some cell of the run shows to have MLA."""
    return frozenset(cell.model for cell in cells if cell.mode is Mode.HELIX_MLA or "MLA" in cell.backend.upper())


def kind_of(cell: Cell, latent: frozenset[str] = frozenset()) -> str:
    """`GQA` or `MLA`: by mode, then backend, then what other cells say of the model, then the model's name."""
    if cell.mode in (Mode.HELIX_GQA, Mode.HELIX_MLA):
        return "MLA" if cell.mode is Mode.HELIX_MLA else "GQA"
    if "MLA" in cell.backend.upper() or cell.model in latent:
        return "MLA"
    return "MLA" if any(name in cell.model.lower() for name in _MLA_NAMES) else "GQA"


def column_of(cell: Cell) -> str:
    return _COLUMN[cell.mode]


class Square(Frozen):
    """One place of the matrix, with at least one cell behind it."""

    kind: str
    backend: str
    hardware: str
    column: str
    cells: tuple[str, ...]  # ids, what a reader must see first in front
    verdict: Verdict
    declared: Verdict
    disagrees: bool
    counts: tuple[tuple[Verdict, int], ...]  # what decides first

    @property
    def anchor(self) -> str:
        return self.anchor_by("backend")

    def anchor_by(self, row: str) -> str:
        """The address that filters for these cells, where the rows of the matrix are backends or models."""
        return fragment(kind=self.kind, **{row: self.backend}, column=self.column, hardware=self.hardware)

    @property
    def note(self) -> str:
        """`6 cells`, or where they are not all alike `6 cells: 5 pass, 1 rejected`."""
        total = plural(len(self.cells), "cell")
        if len(self.counts) == 1:
            return total
        return f"{total}: " + ", ".join(f"{count:,} {verdict}" for verdict, count in self.counts)

    @property
    def standing(self) -> str:
        return f"{'≠ ' if self.disagrees else ''}declared {self.declared}"


def square(kind: str, backend: str, hardware: str, column: str, results: list[CellResult]) -> Square:
    """What `results` say together, by the rule of this module."""
    listed = sorted(results, key=lambda result: severity(result.declared, result.verdict))
    ranked = sorted(listed, key=_rank)
    worst = ranked[0].verdict
    deciding = [result.declared for result in ranked if result.verdict is worst and result.effect is ranked[0].effect]
    return Square(
        kind=kind,
        backend=backend,
        hardware=hardware,
        column=column,
        cells=tuple(result.cell.id for result in listed),
        verdict=worst,
        declared=min(deciding, key=lambda declared: severity(declared, declared)),
        disagrees=any(result.effect is Effect.DIFFERS for result in results),
        counts=tuple(Counter(result.verdict for result in ranked).items()),
    )


class Matrix(Frozen):
    """One table: the squares of one kind of model, `rows[backend][hardware, column]`; by model likewise."""

    kind: str
    by: Literal["backend", "model"]
    models: tuple[str, ...]
    hardware: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Square | None, ...]], ...]  # squares: hardware by hardware, COLUMNS in each

    @property
    def squares(self) -> list[Square]:
        return [found for _, line in self.rows for found in line if found]

    def part(self, hardware: set[str]) -> Self | None:
        """The columns of this hardware and the rows that have a cell there; None where there is none."""
        wide = len(COLUMNS)
        kept = [place for place, name in enumerate(self.hardware) if name in hardware]
        rows = [
            (name, tuple(one for at in kept for one in line[at * wide : (at + 1) * wide])) for name, line in self.rows
        ]
        rows = [(name, line) for name, line in rows if any(line)]
        names = tuple(self.hardware[place] for place in kept)
        return self.model_copy(update={"hardware": names, "rows": tuple(rows)}) if rows else None


def matrices(
    table: pd.DataFrame, results: dict[str, CellResult], by: Literal["backend", "model"] = "backend"
) -> list[Matrix]:
    """The matrix of each kind that has cells, from `harness.report.table.tabulate` and its results by id.

    By model, a square's `backend` is the model.

    Hardware on which something ran comes first; hardware that has no cell of a kind is not in its table.
    """
    real = table[table["fault"] == ""]
    ran = set(real.loc[~real["verdict"].isin(["skip", "stale"]), "hardware"])
    groups = real.groupby(["kind", by, "hardware", "column"], sort=False)["id"]
    squares = {key: square(*key, [results[cell_id] for cell_id in ids]) for key, ids in groups}
    found = []
    for kind in KINDS:
        here = real[real["kind"] == kind]
        hardware = tuple(sorted(set(here["hardware"]), key=lambda name: (name not in ran, *place(name, HARDWARE))))
        rows = []
        for backend in sorted(set(here[by]), key=lambda name: (name == "auto", name)):
            line = [squares.get((kind, backend, name, column)) for name in hardware for column in COLUMNS]
            rows.append((backend, tuple(line)))
        rows.sort(key=lambda row: min(i for i, found in enumerate(row[1]) if found) // len(COLUMNS))
        if rows:
            models = tuple(sorted(set(here["model"])))
            found.append(Matrix(kind=kind, by=by, models=models, hardware=hardware, rows=tuple(rows)))
    return found


def place(name: str, known: tuple[str, ...]) -> tuple[int, str]:
    """Sort key: known names in their order, then the others by name."""
    return (known.index(name) if name in known else len(known), name)
