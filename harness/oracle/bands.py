"""The null bands of one run: measured from its own baselines, saved in its folder, the shipped ones behind them."""

from collections import defaultdict
from pathlib import Path

from harness.cell import Cell
from harness.executors.local import dtype_of
from harness.oracle.band import Band, measured_elsewhere, shipped
from harness.oracle.calibrate import NullPair, calibrate
from harness.references import pack, unpack
from harness.transcript import Transcript

TP_SIZE = "tp size"
BATCH = "batch composition"
AGAIN = "again"


class Bands:
    """Bands by the key of the baseline that they were measured with. A band is measured anew with each pair."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pairs: dict[str, list[bytes]] = defaultdict(list)  # NullPairs, packed: a run may have hundreds
        self.measured: dict[str, Band] = {}
        self.problems: dict[str, str] = {}  # why a baseline has no band of its own

    def add(self, cell: Cell, kind: str, transcript: Transcript, other: Transcript) -> None:
        """Count the difference of baseline `cell`'s transcript to another of standard TP as null."""
        self.pairs[cell.key].append(pack(NullPair(kind, transcript, other)))
        spread, shapes = measured_elsewhere(transcript.dtype, cell.model)
        name = f"of this run ({cell.model}, {transcript.dtype}, TP{cell.tp})"
        try:
            pairs = [unpack(packed) for packed in self.pairs[cell.key]]
            band = calibrate(pairs, name=name, model=cell.model, spread=spread, shapes=shapes)
        except ValueError as problem:
            self.problems[cell.key] = str(problem)
            return
        self.measured[cell.key] = band
        self.folder.mkdir(parents=True, exist_ok=True)
        band.save(self.folder / f"{cell.key}.json")

    def of(self, cell: Cell) -> Band | None:
        """The band measured with baseline `cell`, else the shipped one of its dtype and kind of model, else None."""
        return self.measured[cell.key] if cell.key in self.measured else elsewhere(cell)


def elsewhere(cell: Cell) -> Band | None:
    """The shipped band of `cell`'s dtype and kind of model, None where there is none."""
    try:
        return shipped(dtype_of(cell), cell.model)
    except KeyError:
        return None
