"""What one worker needs to merge its partials with those of its KVP group, in one value shared by all its layers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from helix_runtime.layout import Layout
from helix_runtime.proof import ProofWriter
from helix_runtime.vllm_plugin.faults import Fault


@dataclass
class ContextParallel:
    """This rank's place in its KVP group, the combine, and the counters that prove both were used.

    comm: vLLM's `--dcp-comm-backend`, `a2a` or `ag_rs`. combine: partials [B, H, D] and [B, H] (natural log, fp32) of
    this shard -> merged output [B, H / KVP, D] of the heads this rank owns; combine_name: the function behind it.
    counts_tokens: also count tokens written, which on a GPU costs a synchronisation a layer. fault: harmless unless a
    deliberate defect is armed.
    """

    layout: Layout
    rank: int
    comm: str
    interleave: int
    proof: ProofWriter
    make_combine: Callable[["ContextParallel"], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    combine_name: str
    counts_tokens: bool
    fault: Fault = field(default_factory=Fault)

    def __post_init__(self):
        self.combine = self.make_combine(self)

    @property
    def kvp(self) -> int:
        return self.layout.kvp

    @property
    def kvp_rank(self) -> int:
        return self.layout.kvp_rank(self.rank)

    @property
    def helix(self) -> bool:
        return self.layout.mode.startswith("helix")


#: Names in reports of implementations of ours, which inside vLLM keep the name of the stock backend they extend.
BACKEND_NAMES = {"HelixCPUAttentionImpl": "HELIX_CPU", "HelixCPUMLAImpl": "HELIX_CPU_MLA"}

_current: ContextParallel | None = None


def set_current(context: ContextParallel) -> None:
    global _current
    _current = context


def current() -> ContextParallel:
    """The worker's context. Set before its model is built."""
    assert _current is not None, "no Helix context: the worker's load_model hook has not run"
    return _current
