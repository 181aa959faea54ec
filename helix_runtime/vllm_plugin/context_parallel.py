"""What one worker needs to merge its partials with those of its KVP group, in one value shared by all its layers."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from helix_runtime.layout import Layout
from helix_runtime.proof import ProofWriter
from helix_runtime.vllm_plugin.capture import Capture
from helix_runtime.vllm_plugin.faults import NOTHING_ARMED, ArmedFault, Fault, Reading, Site


@dataclass
class ContextParallel:
    """This rank's place in its KVP group, the combine, and the counters that prove both were used.

    comm: vLLM's `--dcp-comm-backend`, `a2a` or `ag_rs`. combine: partials [B, H, D] and [B, H] (natural log, fp32) of
    this shard -> merged output [B, H / KVP, D] of the heads this rank owns; combine_name: the function behind it.
    counts_tokens: count tokens where a layer writes them; False where `device_proof.py` counts them once a step. armed:
    the deliberate defect, if any. capture: compares every merge with fp64, if asked for. site: the attention call that
    is running; to_check: its inputs, where attention and combine are called apart (MLA) and a capture wants them.
    micro_batches: into how many a decode batch is cut, so that their exchanges overlap (`helix_runtime.overlap`); 1 is
    none.
    """

    layout: Layout
    rank: int
    comm: str
    interleave: int
    proof: ProofWriter
    make_combine: Callable[["ContextParallel"], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    combine_name: str
    counts_tokens: bool
    micro_batches: int = 1
    armed: ArmedFault = NOTHING_ARMED
    capture: Capture | None = None
    site: Site | None = field(default=None, init=False)
    to_check: dict = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.combine = self.make_combine(self)

    @property
    def kvp(self) -> int:
        return self.layout.kvp

    @property
    def kvp_rank(self) -> int:
        return self.layout.kvp_rank(self.rank)

    @property
    def fault(self) -> Fault:
        """What strikes the attention call that is running; harmless outside of one."""
        return self.armed.at(self.site) if self.site else NOTHING_ARMED.fault

    def enter(
        self,
        layer_name: str,
        requests: int,
        decode: bool,
        reads_context: bool,
        seq_lens: torch.Tensor | None = None,
        query_start_loc: torch.Tensor | None = None,
    ) -> Site:
        """Say which attention call runs now; a name without a layer's number stands for all layers. See `Site`."""
        found = _LAYER.search(layer_name)
        self.site = Site(
            layer=int(found.group(1)) if found else -1,
            kvp_rank=self.kvp_rank,
            requests=requests,
            decode=decode,
            reads_context=reads_context,
            first_head=self.layout.query_heads_computed(self.rank).start,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
        )
        return self.site

    def reads(self, shard: dict) -> dict:
        """The inputs of attention, as a fault leaves them."""
        right = Reading(shard["query"], shard["block_table"], shard["scale"])
        return {**shard, **self.fault.reads(right, self.site)._asdict()}

    @property
    def helix(self) -> bool:
        return self.layout.mode.startswith("helix")


#: Names in reports of implementations of ours, which inside vLLM keep the name of the stock backend they extend.
BACKEND_NAMES = {"HelixCPUAttentionImpl": "HELIX_CPU", "HelixCPUMLAImpl": "HELIX_CPU_MLA"}

_LAYER = re.compile(r"\.(\d+)\.")

_current: ContextParallel | None = None


def set_current(context: ContextParallel) -> None:
    global _current
    _current = context


def current() -> ContextParallel:
    """The worker's context. Set before its model is built."""
    assert _current is not None, "no Helix context: the worker's load_model hook has not run"
    return _current
