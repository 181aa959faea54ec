"""Right servers compared with each other, each pair with a null band that it had no part in."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness.oracle.band import Band, measured_elsewhere
from harness.oracle.calibrate import RESOLUTION, NullPair, calibrate
from harness.oracle.compare import Comparison, compare
from harness.oracle.saved import Saved, pairs


class Clean(NamedTuple):
    """`first` is standard TP; `band` was measured from it and another standard TP that is not `second`."""

    first: Saved
    second: Saved
    found: Comparison
    band: Band

    @property
    def identical(self) -> bool:
        """No step changed at all: nothing was put to the test."""
        return all(step.widest <= RESOLUTION for step in self.found.steps)


def clean_comparisons(saved: Sequence[Saved]) -> Iterator[Clean]:
    """Every two transcripts with the same tokens, the first of standard TP; two of standard TP once."""
    all_pairs = list(pairs(saved))
    partners: dict[str, list[Saved]] = defaultdict(list)
    for first, second in all_pairs:
        if second.mode == "standard-tp":
            partners[first.key].append(second)
    bands: dict[tuple[str, str], Band | None] = {}
    for first, second in all_pairs:
        twice = second.mode == "standard-tp" and second.key < first.key
        partner = next((other for other in _nulls(first, partners[first.key]) if other.key != second.key), None)
        if partner is None or twice:
            continue
        if (first.key, partner.key) not in bands:
            bands[first.key, partner.key] = _band(first, partner)
        band = bands[first.key, partner.key]
        if band is not None:
            yield Clean(first, second, compare(first.transcript, second.transcript), band)


def _nulls(first: Saved, partners: Sequence[Saved]) -> list[Saved]:
    """Partners in the order in which a run would take them: of another TP size, TP1 before others."""
    return sorted((other for other in partners if other.tp != first.tp), key=lambda other: (other.tp, other.key))


def _band(first: Saved, partner: Saved) -> Band | None:
    model = f"recipe:{first.model}"
    pair = NullPair("tp size", first.transcript, partner.transcript)
    spread, shapes = measured_elsewhere(first.transcript.dtype, model)
    try:
        return calibrate([pair], name="of another pair", model=model, spread=spread, shapes=shapes)
    except ValueError:
        return None
