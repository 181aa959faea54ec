"""Proof of path: what each worker says of the attention and combine that really ran.

A worker writes two files into the proof folder: `rank3.json`, who it is (written once, when its model is built), and
`rank3.counters`, int64 counters in a memory map that are bumped in place, so that a reader sees them live, a crash
loses nothing, and a bump costs an array store.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

#: Names and order of the counters in the memory map. Append only.
COUNTERS = (
    "decode_attention",  # attention calls on batches that hold only decode tokens
    "decode_combine",  # combines in such batches
    "prefill_attention",  # attention calls on batches that hold prefill tokens
    "prefill_combine",
    "empty_shard",  # (request, layer) pairs whose local shard was empty
    "local_tokens",  # KV tokens written to this rank's shard, summed over layers
    "global_tokens",  # tokens that passed this rank's KV update, summed over layers
    "context_prefill",  # prefill calls that read what was cached before: a prefix hit or a second chunk
    "all_to_all",  # All-to-Alls really called for a combine (CPU)
    "all_gather",  # AllGathers of LSEs really called for a combine (CPU)
    "reduce_scatter",  # ReduceScatters really called for a combine (CPU)
    "exchange_members",  # members of the groups of these three, summed over calls
)


@dataclass(frozen=True)
class RankProof:
    """What one worker ran. `combine` is `a2a`, `ag_rs` or `none`; `combine_impl` names the function that did it."""

    rank: int
    tp: int
    kvp: int
    tpa: int
    kvp_rank: int
    tpa_rank: int
    helix: bool
    backend: str
    impl: str
    combine: str
    combine_impl: str
    group_size: int
    group_ranks: tuple[int, ...]
    interleave: int
    lse_base: str
    model_runner: str
    vllm_version: str
    self_test: str
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Deviation:
    """The first merged attention of one rank that differs from fp64 (`vllm_plugin/capture.py`).

    call: attention calls before it on this rank. head: query head of the model. request, position: row of the batch and
    position in its sequence. error: relative to the largest value of the right answer.
    """

    call: int
    layer: int
    head: int
    rank: int
    kvp_rank: int
    request: int
    position: int
    requests: int
    decode: bool
    error: float


class ProofWriter:
    """Counters of one worker. Without a folder every call is a no-op on a private array."""

    def __init__(self, folder: str | os.PathLike | None, rank: int):
        self.folder = Path(folder) if folder else None
        self.rank = rank
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._counters = np.memmap(
                self.folder / f"rank{rank}.counters", dtype=np.int64, mode="w+", shape=(len(COUNTERS),)
            )
        else:
            self._counters = np.zeros(len(COUNTERS), dtype=np.int64)

    def identify(self, proof: RankProof) -> None:
        """Write who this worker is, atomically."""
        if self.folder:
            path = self.folder / f"rank{self.rank}.json"
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(dataclasses.asdict(proof)))
            scratch.replace(path)

    def count(self, name: str, by: int = 1) -> None:
        self._counters[_INDEX[name]] += by


def read_proofs(folder: str | os.PathLike) -> list[RankProof]:
    """All ranks' proofs in `folder`, with their counters as they stand now, by rank. Missing folder: empty list."""
    proofs = []
    for path in sorted(Path(folder).glob("rank*.json"), key=lambda path: int(path.stem.removeprefix("rank"))):
        fields = json.loads(path.read_text())
        values = np.fromfile(path.with_suffix(".counters"), dtype=np.int64)
        fields["counters"] = dict(zip(COUNTERS, (int(value) for value in values), strict=False))
        fields["group_ranks"] = tuple(fields["group_ranks"])
        proofs.append(RankProof(**fields))
    return proofs


_INDEX = {name: index for index, name in enumerate(COUNTERS)}
