"""The null bands of one run: measured from its own baselines, saved in its folder, the shipped ones behind them."""

from pathlib import Path

from harness.cell import Cell
from harness.executors.local import dtype_of
from harness.oracle.band import Band, shipped, spread_of
from harness.oracle.calibrate import NullPair, calibrate
from harness.transcript import Transcript


class Bands:
    """Bands by the key of the baseline that they were measured with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.measured: dict[str, Band] = {}

    def measure(self, cell: Cell, transcript: Transcript, tp1: Transcript) -> str:
        """The band of baseline `cell` from its difference to TP1. Returns why there is none, or nothing."""
        pairs = [NullPair("tp size", transcript, tp1)]
        spread = spread_of(transcript.dtype, cell.model)
        name = f"{cell.model} {transcript.dtype} tp{cell.tp}, this run"
        try:
            band = calibrate(pairs, name=name, model=cell.model, spread=spread)
        except ValueError as problem:
            return str(problem)
        self.measured[cell.key] = band
        self.folder.mkdir(parents=True, exist_ok=True)
        band.save(self.folder / f"{cell.key}.json")
        return ""

    def of(self, cell: Cell, baseline: Cell | None) -> Band | None:
        """The band measured with `baseline`, else the shipped one of the cell's dtype and kind of model, else None."""
        if baseline is not None and baseline.key in self.measured:
            return self.measured[baseline.key]
        try:
            return shipped(dtype_of(cell), cell.model)
        except KeyError:
            return None
