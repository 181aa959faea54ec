"""Deliberate defects, switchable in a worker by name: `additional_config={"helix": {"fault": NAME}}`.

They exist to test the oracle: a comparison that cannot tell these from a right answer proves nothing. A fault is armed
after the start-up self-test, which would refuse most of them.
"""

import torch

from helix_runtime.combine.collectives import Collectives
from helix_runtime.vllm_plugin.refusal import HelixRefusal

FAULTS: dict[str, type["Fault"]] = {}


class Fault:
    """The points at which a defect can enter one layer's attention. This base class changes nothing."""

    lse_base = "e"

    def local_lengths(self, lengths: torch.Tensor, kvp_rank: int) -> torch.Tensor:
        """Local lengths [R] of the batch before attention reads the shard."""
        return lengths

    def partial(self, output: torch.Tensor, lse: torch.Tensor, kvp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's partial, [B, H, D] and [B, H], before it is sent."""
        return output, lse

    def collectives(self, collectives: Collectives) -> Collectives:
        """The collectives that the combine will use."""
        return collectives


def fault(name: str):
    def register(cls: type[Fault]) -> type[Fault]:
        FAULTS[name] = cls
        return cls

    return register


def make_fault(name: str | None) -> Fault:
    """The fault of that name, or the harmless one for None. Raises HelixRefusal for an unknown name."""
    if name is None:
        return Fault()
    if name not in FAULTS:
        raise HelixRefusal(f"no fault is called {name!r}; there are: {', '.join(sorted(FAULTS))}")
    return FAULTS[name]()


@fault("swap-chunks")
class SwapChunks(Fault):
    """The first two ranks of each group get each other's heads (as TensorRT-LLM#10350: wrong rank order)."""

    def collectives(self, collectives):
        def swapped(exchange):
            def call(output, input, *, group):
                order = [1, 0, *range(2, input.shape[0])]
                return exchange(output, input[order].contiguous(), group=group)

            return call

        return collectives._replace(
            all_to_all=swapped(collectives.all_to_all), reduce_scatter=swapped(collectives.reduce_scatter)
        )


@fault("lse-base-2")
class LseBase2(Fault):
    """Natural LSEs are merged as base 2 (as sglang#40903 and vllm#52796, the other way round)."""

    lse_base = "2"


@fault("drop-shard")
class DropShard(Fault):
    """The second shard of each group never arrives."""

    def partial(self, output, lse, kvp_rank):
        return (output, torch.full_like(lse, float("-inf"))) if kvp_rank == 1 else (output, lse)


@fault("local-length-off-by-one")
class LocalLengthOffByOne(Fault):
    """The first shard of each group misses its newest token (as vLLM 0.15-0.29's wrong local lengths)."""

    def local_lengths(self, lengths, kvp_rank):
        return (lengths - 1).clamp(min=0) if kvp_rank == 0 else lengths


@fault("stale-lse")
class StaleLse(Fault):
    """The LSE of the call before is sent where its shape fits (as vllm#36070: a buffer that nobody refreshed)."""

    def __init__(self):
        self.before: torch.Tensor | None = None

    def partial(self, output, lse, kvp_rank):
        stale, self.before = self.before, lse.clone()
        return output, stale if stale is not None and stale.shape == lse.shape else lse
