"""Deliberate defects of what is read and written, and of what never ran: lengths, owners, blocks, slots, fallbacks."""

import torch
import torch.distributed as dist

from helix_runtime.combine.merge import merge_partials
from helix_runtime.sharding import PAD_SLOT, local_lengths
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.faults import Fault, fault


@fault("local-length-off-by-one")
class LocalLengthOffByOne(Fault):
    """The first shard of each group misses its newest token (as vLLM 0.15-0.29's wrong local lengths)."""

    def local_lengths(self, lengths, site):
        return (lengths - 1).clamp(min=0) if site.kvp_rank == 0 else lengths


@fault("local-length-without-interleave")
class LocalLengthWithoutInterleave(Fault):
    """Local lengths as if tokens were dealt one by one (as vLLM's FLASHINFER with an interleave, 0.15-0.29)."""

    def local_lengths(self, lengths, site):
        if site.seq_lens is None:
            return lengths
        context = current()
        return local_lengths(site.seq_lens, context.kvp, context.kvp_rank, 1).to(lengths.dtype)


@fault("reads-neighbour-blocks")
class ReadsNeighbourBlocks(Fault):
    """Each request reads the block table of the one after it (as vllm#48003: pages of others)."""

    def reads(self, reading, site):
        return reading._replace(block_table=reading.block_table.roll(-1, 0))


@fault("wrong-scale")
class WrongScale(Fault):
    """Scores are scaled for a head that is an eighth wider: the scale of another head size."""

    def reads(self, reading, site):
        return reading._replace(scale=reading.scale * (8 / 9) ** 0.5)


@fault("query-head-off-by-one")
class QueryHeadOffByOne(Fault):
    """Query heads stand one place too early, and back: some read the keys of the neighbouring KV head (sglang#34355).

    With one KV head (MLA) every query head reads the same keys, so this changes nothing there.
    """

    def reads(self, reading, site):
        return reading._replace(query=reading.query.roll(-1, 1))

    def partial(self, output, lse, site):
        return output.roll(1, 1), lse.roll(1, 1)


@fault("owner-off-by-one")
class OwnerOffByOne(Fault):
    """The last token of each run is written to where the next run begins (an owner off by one at the boundary)."""

    def slots(self, writing, site):
        last = writing.positions % writing.interleave == writing.interleave - 1
        return torch.where(last, writing.slot_of(writing.positions + 1), writing.slots)


@fault("owner-of-decode-off-by-one")
class OwnerOfDecodeOffByOne(Fault):
    """A decoded token that begins a run is written as if it still belonged to the run before (TensorRT-LLM#17795)."""

    def slots(self, writing, site):
        first = writing.positions % writing.interleave == 0
        wrong = writing.slot_of((writing.positions - 1).clamp(min=0))
        return torch.where(first, wrong, writing.slots) if site.decode else writing.slots


@fault("lost-write")
class LostWrite(Fault):
    """One token in a hundred is never written to the cache."""

    def slots(self, writing, site):
        return torch.where(writing.positions % 100 == 57, PAD_SLOT, writing.slots)


@fault("stale-reuse")
class StaleReuse(Fault):
    """A slot that was written once is not written again, at block starts: a reused block keeps a token of before.

    Strikes after preemption, an abort or the end of a request, when its blocks go to another one.
    """

    def __init__(self):
        self.written: set[int] = set()

    def slots(self, writing, site):
        slots = writing.slots.tolist()
        stale = [slot in self.written and slot % writing.block_size == 0 for slot in slots]
        self.written |= {slot for slot in slots if slot >= 0}
        return torch.where(torch.tensor(stale, dtype=torch.bool), PAD_SLOT, writing.slots)


@fault("mlp-shard-of-rank-0")
class MlpShardOfRank0(Fault):
    """Every rank holds rank 0's shard of the MLP (as TensorRT-LLM#17796, a loader): an error outside attention.

    Changes nothing on CPU: vLLM's linear layers there have packed their weights by the time a fault is armed.
    """

    def weights(self, model, rank):
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                dist.broadcast(parameter.data, src=0)


@fault("no-combine")
class NoCombine(Fault):
    """Each rank keeps its own partial of the heads that it owns: the exchange is skipped (a silent fallback)."""

    def replaces(self, output, lse, site, group):
        owned = output.shape[1] // dist.get_world_size(group)
        return output[:, site.kvp_rank * owned : (site.kvp_rank + 1) * owned].clone()


@fault("other-combine")
class OtherCombine(Fault):
    """The other combine runs (vllm#48248): answers are right, the claim is not."""

    def replaces(self, output, lse, site, group):
        from helix_runtime.combine import COMBINES
        from helix_runtime.vllm_plugin.exchange import counting

        other = {"a2a": "ag_rs", "ag_rs": "a2a"}[current().comm]
        return COMBINES[other](output, lse, group, collectives=counting(current()))


@fault("dies")
class Dies(Fault):
    """The worker raises in the middle of a step, as an assertion or an access beyond its memory would make it."""

    def partial(self, output, lse, site):
        raise RuntimeError(f"a deliberate defect: KVP rank {site.kvp_rank} dies in layer {site.layer}")


@fault("standard-path")
class StandardPath(Fault):
    """All partials are gathered everywhere and merged there: right answers by a path that nobody claimed."""

    def replaces(self, output, lse, site, group):
        members, owned = dist.get_world_size(group), output.shape[1] // dist.get_world_size(group)
        outputs = [torch.empty_like(output) for _ in range(members)]
        lses = [torch.empty_like(lse) for _ in range(members)]
        dist.all_gather(outputs, output.contiguous(), group=group)
        dist.all_gather(lses, lse.contiguous(), group=group)
        merged, _ = merge_partials(torch.stack(outputs), torch.stack(lses))
        return merged[:, site.kvp_rank * owned : (site.kvp_rank + 1) * owned].contiguous()
