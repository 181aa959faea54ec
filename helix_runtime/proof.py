"""Proof of path: what each worker says of the attention and combine that really ran.

A worker writes two files into the proof folder: `rank3.json`, who it is (written once, when its model is built), and
`rank3.counters`, int64 counters in a memory map that are bumped in place, so that a reader sees them live, a crash
loses nothing, and a bump costs an array store. Under CUDA graphs the counters live on the device instead
(`device_counters.py`), and are copied into the same map every PUBLISHED seconds.
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from helix_runtime.device_counters import DeviceCounters

#: How often counters on a device are copied out, in seconds.
PUBLISHED = 0.25

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
    "misplaced_tokens",  # tokens written to a rank that does not own them, or not written by the one that does
    "overlapped_combine",  # decode combines that ran beside the attention of the next micro-batch (HOP-B)
    "replayed_combine",  # of all combines, those that a replay of a captured CUDA graph ran
)


@dataclass(frozen=True)
class RankProof:
    """What one worker ran. `combine` is `a2a`, `ag_rs` or `none`; `combine_impl` names the function that did it.

    `micro_batches`: into how many a decode batch is cut (`helix.overlap`).
    `q_replicated`: every MLA layer projects the queries of its whole DCP group (`--dcp-q-replicate`): no gather.
    `cudagraph_mode`: vLLM's name of the mode of CUDA graphs that it settled on; `graphs_captured`: how many there are.
    Both are known where a proof is counted on the device.
    `on_device`: the counters are counted on the device, replays of graphs included, and lag by up to PUBLISHED.
    """

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
    on_device: bool = False
    micro_batches: int = 1
    q_replicated: bool = False
    cudagraph_mode: str = ""
    graphs_captured: int = 0
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
    """Counters of one worker. Without a folder every call is a no-op on a private array.

    on_device: count there instead, from `count_on` on; `publish` then copies the values out.
    """

    def __init__(self, folder: str | os.PathLike | None, rank: int):
        self.on_device: DeviceCounters | None = None
        self.proof: RankProof | None = None
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
        self.proof = proof
        if self.folder:
            path = self.folder / f"rank{self.rank}.json"
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(dataclasses.asdict(proof)))
            scratch.replace(path)

    def amend(self, **changes) -> None:
        """Write again who this worker is, with what was not known before; nothing where nobody was identified."""
        if self.proof:
            self.identify(dataclasses.replace(self.proof, **changes))

    def count_on(
        self, device: "torch.device", capture_id: "Callable[[], int | None] | None" = None
    ) -> "DeviceCounters":
        """Count on `device` from now on; `capture_id` as in `DeviceCounters`."""
        from helix_runtime.device_counters import DeviceCounters

        self.on_device = DeviceCounters(device, COUNTERS, TOGETHER, capture_id)
        return self.on_device

    def count(self, name: str, by: "int | torch.Tensor" = 1) -> None:
        """Add `by`. A tensor of one integer costs a synchronisation, unless counters are on its device."""
        if self.on_device:
            self.on_device.add(name, by)
        else:
            self._counters[_INDEX[name]] += int(by)

    def ran(self, phase: str, combined: bool = True, captured: bool = False) -> None:
        """Count an attention call of `phase` (`decode` or `prefill`), and the combine that followed if one did.

        `captured`: a CUDA graph is being captured, and every replay shall count. One that is captured with several new
        tokens a request serves any batch: what its replay ran is what `step_is` said of the step.
        """
        names = _RAN[phase, combined]
        if not self.on_device:
            for name in names:
                self.count(name)
        elif not captured:
            self.on_device.bump_eager(names)
        elif not combined:
            self.on_device.bump(*names)
        elif phase == "prefill":
            self.on_device.bump_step()
        else:
            self.on_device.bump(*names, "replayed_combine")

    def overlapped(self) -> None:
        """Count a combine that ran beside the attention of the next micro-batch; replays of a graph count it too."""
        if self.on_device:
            self.on_device.bump("overlapped_combine")
        else:
            self.count("overlapped_combine")

    def step_is(self, prefill: "torch.Tensor") -> None:
        """Say on the device, outside of any graph, whether the step that comes holds prefill tokens: one bool."""
        if self.on_device and self.on_device.follows:
            self.on_device.set_step(prefill, _REPLAYED["prefill"], _REPLAYED["decode"])

    def publish(self, values: list[int]) -> None:
        """Put values that were counted on a device where readers look."""
        self._counters[:] = values


def read_proofs(folder: str | os.PathLike) -> list[RankProof]:
    """All ranks' proofs in `folder`, with their counters as they stand now, by rank. Missing folder: empty list.

    Where counters are on a device, waits until what was counted before this call has been copied out.
    """
    proofs: list[RankProof] = []
    waited = False
    for path in sorted(Path(folder).glob("rank*.json"), key=lambda path: int(path.stem.removeprefix("rank"))):
        fields = json.loads(path.read_text())
        if fields.get("on_device") and not waited:
            time.sleep(2 * PUBLISHED)
            waited = True
        values = np.fromfile(path.with_suffix(".counters"), dtype=np.int64)
        fields["counters"] = dict(zip(COUNTERS, (int(value) for value in values), strict=False))
        fields["group_ranks"] = tuple(fields["group_ranks"])
        proofs.append(RankProof(**fields))
    return proofs


#: What `ProofWriter.ran` counts at once.
_PAIRS = {phase: (f"{phase}_attention", f"{phase}_combine") for phase in ("decode", "prefill")}
_REPLAYED = {phase: (*pair, "replayed_combine") for phase, pair in _PAIRS.items()}
_RAN = {
    (phase, combined): pair if combined else pair[:1] for phase, pair in _PAIRS.items() for combined in (True, False)
}
TOGETHER = (*_PAIRS.values(), *_REPLAYED.values())

_INDEX = {name: index for index, name in enumerate(COUNTERS)}
