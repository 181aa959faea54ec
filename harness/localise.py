"""Where a failed cell goes wrong: one more run with capture on, read back as a sentence.

The workers compare every merged attention with fp64 computed from the shards (`helix_runtime/vllm_plugin/capture.py`).
"""

import json
from pathlib import Path

from harness.cell import Cell
from helix_runtime.proof import Deviation


def can_localise(cell: Cell) -> bool:
    """Capture exists for the CPU backends of context-parallel cells."""
    return cell.hardware == "cpu" and cell.kvp > 1


def with_capture(cell: Cell) -> Cell:
    return cell.model_copy(update={"helix": (*cell.helix, ("capture", True))})


def read_captures(folder: Path) -> tuple[int, list[Deviation]]:
    """(most attention calls checked on a rank, each rank's first deviation) from the files in a proof folder."""
    calls, deviations = 0, []
    for path in sorted(folder.glob("capture.rank*.json")):
        record = json.loads(path.read_text())
        calls = max(calls, record["calls"])
        if record["first"]:
            deviations.append(Deviation(**record["first"]))
    return calls, deviations


def describe(folder: Path) -> str:
    """One sentence for the report: the first layer, head and rank whose merge is wrong, or that none is."""
    calls, deviations = read_captures(folder)
    if not calls:
        return "localisation: the run with capture checked nothing"
    if not deviations:
        return (
            f"localisation: all of {calls} merged attentions a rank equal fp64 computed from the shards; "
            f"the error is outside the merge (what was written to the cache, weights, or after attention)"
        )
    first = min(deviations, key=lambda found: (found.call, -found.error))
    ranks = sorted({found.rank for found in deviations if found.call == first.call})
    phase = "decode" if first.decode else "prefill"
    return (
        f"localisation: the first wrong merge is in layer {first.layer}, query head {first.head}, on rank {first.rank} "
        f"(KVP rank {first.kvp_rank}), at position {first.position} of row {first.request} in a {phase} batch of "
        f"{first.requests}: relative error {first.error:.2g} against fp64 from the shards; ranks that differ there: "
        f"{', '.join(map(str, ranks))}"
    )
