"""What one worker needs to merge its partials with those of its KVP group, in one value shared by all its layers."""

import torch
import torch.distributed as dist

from helix_runtime.combine import COMBINES
from helix_runtime.combine.collectives import DIST
from helix_runtime.layout import Layout
from helix_runtime.proof import ProofWriter
from helix_runtime.vllm_plugin.faults import Fault


class ContextParallel:
    """This rank's place in its KVP group, the combine, and the counters that prove both were used.

    `comm` is vLLM's `--dcp-comm-backend`: `a2a` or `ag_rs`. `fault` is harmless unless a deliberate defect is armed.
    """

    def __init__(
        self, layout: Layout, rank: int, comm: str, interleave: int, group: dist.ProcessGroup, proof: ProofWriter
    ):
        self.layout = layout
        self.rank = rank
        self.kvp_rank = layout.kvp_rank(rank)
        self.comm = comm
        self.interleave = interleave
        self.group = group
        self.proof = proof
        self.fault = Fault()

    @property
    def kvp(self) -> int:
        return self.layout.kvp

    @property
    def helix(self) -> bool:
        return self.layout.mode.startswith("helix")

    @property
    def combine_name(self) -> str:
        function = COMBINES[self.comm]
        return f"{function.__module__}.{function.__qualname__}"

    def combine(self, partial_output: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
        """Partials [B, H, D] and [B, H] (natural log) of this shard -> merged output [B, H / KVP, D] of owned heads."""
        partial_output, partial_lse = self.fault.partial(partial_output, partial_lse, self.kvp_rank)
        return COMBINES[self.comm](
            partial_output,
            partial_lse,
            self.group,
            lse_base=self.fault.lse_base,
            collectives=self.fault.collectives(DIST),
        )


_current: ContextParallel | None = None


def set_current(context: ContextParallel) -> None:
    global _current
    _current = context


def current() -> ContextParallel:
    """The worker's context. Set before its model is built."""
    assert _current is not None, "no Helix context: the worker's load_model hook has not run"
    return _current
