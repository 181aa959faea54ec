"""Right servers compared with each other, each pair with a null band that it had no part in."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from harness.oracle.band import Band, measured_elsewhere
from harness.oracle.calibrate import RESOLUTION, NullPair, calibrate
from harness.oracle.compare import Comparison, compare
from harness.oracle.saved import Saved, pairs


class Clean(NamedTuple):
    """Two right servers. `band` was measured on the same prompts from standard TP: from `first` and another where
    `first` is standard TP, else from two others; never from `second`."""

    first: Saved
    second: Saved
    found: Comparison
    band: Band

    @property
    def identical(self) -> bool:
        """No step changed at all: nothing was put to the test."""
        return all(step.widest <= RESOLUTION for step in self.found.steps)


def clean_comparisons(saved: Sequence[Saved]) -> Iterator[Clean]:
    """Every two transcripts with the same tokens, once."""
    all_pairs = list(pairs(saved))
    partners: dict[str, list[Saved]] = defaultdict(list)
    leads: dict[str, Saved] = {}  # of what is not standard TP: the standard TP that a run would compare it with
    for first, second in all_pairs:
        if first.standard and second.standard and second.complete:
            partners[first.key].append(second)
        elif first.standard and not second.standard and (second.key not in leads or not first.forced):
            leads[second.key] = first
    bands: dict[tuple[str, str], Band | None] = {}
    for first, second in all_pairs:
        lead = first if first.standard else leads.get(first.key)
        # Two of standard TP come both ways and count once; where one is incomplete they come one way.
        twice = first.standard and second.standard and second.complete and second.key < first.key
        if lead is None or twice:
            continue
        partner = next((other for other in _nulls(lead, partners[lead.key]) if other.key != second.key), None)
        if partner is None:
            continue
        if (lead.key, partner.key) not in bands:
            bands[lead.key, partner.key] = _band(lead, partner)
        band = bands[lead.key, partner.key]
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
