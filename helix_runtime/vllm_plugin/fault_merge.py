"""Deliberate defects of what is sent and merged: rank order, head order, LSE, shards dropped, doubled or stale."""

import math
from collections.abc import Callable

import torch

from helix_runtime.combine.merge import merge_partials, natural
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.faults import Fault, fault


def _before(kept: dict, key: object, fresh: torch.Tensor) -> torch.Tensor:
    """What was given for `key` and this shape before, or `fresh` the first time. `fresh` is kept for the next."""
    key = (key, tuple(fresh.shape))
    stale, kept[key] = kept.get(key, fresh), fresh.clone()
    return stale


def _reordered(collectives, order: Callable[[int], list[int]]):
    """`collectives` whose chunks leave in `order(members)`: a rank sends to another one than it should."""

    def wrapped(exchange):
        def call(output, input, *, group):
            return exchange(output, input[order(input.shape[0])].contiguous(), group=group)

        return call

    return collectives._replace(
        all_to_all=wrapped(collectives.all_to_all), reduce_scatter=wrapped(collectives.reduce_scatter)
    )


@fault("swap-chunks")
class SwapChunks(Fault):
    """The first two ranks of each group get each other's heads (as TensorRT-LLM#10350: wrong rank order)."""

    def collectives(self, collectives):
        return _reordered(collectives, lambda members: [1, 0, *range(2, members)])


@fault("swap-last-chunks")
class SwapLastChunks(Fault):
    """The last two ranks of each group get each other's heads; those before are right."""

    def collectives(self, collectives):
        return _reordered(collectives, lambda members: [*range(members - 2), members - 1, members - 2])


@fault("rotate-chunks")
class RotateChunks(Fault):
    """Every rank of a group gets the heads of the one after it: ranks counted from one."""

    def collectives(self, collectives):
        return _reordered(collectives, lambda members: [*range(1, members), 0])


@fault("lse-of-other-rank")
class LseOfOtherRank(Fault):
    """Outputs are weighted with the LSE of the next rank: the two arrays are gathered in different orders."""

    def merge(self, outputs, lses, base):
        return merge_partials(outputs, lses.roll(1, 0), base)

    def collectives(self, collectives):
        def rolled(output, input, *, group):
            collectives.all_gather(output, input, group=group)
            output.copy_(output.roll(1, 0))

        return collectives._replace(all_gather=rolled)


@fault("heads-dealt-round-robin")
class HeadsDealtRoundRobin(Fault):
    """Heads go to the ranks one by one instead of in runs: each rank merges heads that are not its `o_proj` shard."""

    def partial(self, output, lse, site):
        order = torch.arange(lse.shape[1]).view(-1, current().kvp).T.flatten()
        return output[:, order], lse[:, order]


@fault("head-off-by-one")
class HeadOffByOne(Fault):
    """Within what each rank owns, heads come out one place too late."""

    def merged(self, output, site):
        return output.roll(1, 1)


@fault("lse-base-2")
class LseBase2(Fault):
    """LSEs are merged in the other base (sglang#40903, vllm#52796): natural ones as base 2, FLASHINFER's as base e."""

    lse_base = "2"


@fault("lse-base-2-sent")
class LseBase2Sent(Fault):
    """One rank sends base 2, as a rank with another kernel would; all merge base e (sglang#40903)."""

    def partial(self, output, lse, site):
        return (output, lse / math.log(2)) if site.kvp_rank == 1 else (output, lse)


@fault("lse-of-next-token")
class LseOfNextToken(Fault):
    """Each row is sent with the LSE of the row after it: an index into another batch order."""

    def partial(self, output, lse, site):
        return output, lse.roll(-1, 0)


@fault("lse-of-next-head")
class LseOfNextHead(Fault):
    """Each head is sent with the LSE of the head after it: a stride of heads read as a stride of tokens."""

    def partial(self, output, lse, site):
        return output, lse.roll(-1, 1)


@fault("lse-in-bf16")
class LseInBf16(Fault):
    """The LSE travels in bf16: eight bits, an error of up to 1 in 256 of its size."""

    def partial(self, output, lse, site):
        return output, lse.bfloat16().to(lse.dtype)


@fault("lse-in-fp16")
class LseInFp16(Fault):
    """The LSE travels in fp16: eleven bits."""

    def partial(self, output, lse, site):
        return output, lse.half().to(lse.dtype)


@fault("lse-last-bit")
class LseLastBit(Fault):
    """The last bit of each fp32 LSE is flipped, on one rank: less than rounding."""

    def partial(self, output, lse, site):
        flipped = torch.where(torch.isinf(lse), lse, (lse.contiguous().view(torch.int32) ^ 1).view(lse.dtype))
        return (output, flipped) if site.kvp_rank == 1 else (output, lse)


@fault("output-in-bf16")
class OutputInBf16(Fault):
    """The partial output is rounded to bf16 before it is sent, in a model that computes in fp32."""

    def partial(self, output, lse, site):
        return output.bfloat16().to(output.dtype), lse


@fault("lse-scaled-twice")
class LseScaledTwice(Fault):
    """The LSE is 5 % too small: a scale that was applied to it as well as to the scores."""

    def partial(self, output, lse, site):
        return output, lse * 0.95


@fault("equal-weights")
class EqualWeights(Fault):
    """Shards are averaged, whatever their LSE says."""

    def partial(self, output, lse, site):
        return output, torch.where(torch.isinf(lse), lse, 0.0)


@fault("unnormalised-merge")
class UnnormalisedMerge(Fault):
    """The weighted sum is not divided by the sum of weights (All-to-All only; elsewhere there is no such division)."""

    def merge(self, outputs, lses, base):
        lses = natural(lses, base, torch.float32)
        top = lses.amax(0)
        weights = (lses - top.masked_fill(torch.isinf(top), 0.0)).exp()[..., None]
        return (weights * outputs.nan_to_num()).sum(0), top


@fault("drop-shard")
class DropShard(Fault):
    """The second shard of each group never arrives."""

    def partial(self, output, lse, site):
        return (output, torch.full_like(lse, float("-inf"))) if site.kvp_rank == 1 else (output, lse)


@fault("double-shard")
class DoubleShard(Fault):
    """The first shard of each group is counted twice: its weight is double."""

    def partial(self, output, lse, site):
        return (output, lse + math.log(2)) if site.kvp_rank == 0 else (output, lse)


@fault("stale-lse")
class StaleLse(Fault):
    """The LSE of the call before is sent where its shape fits (as vllm#36070: a buffer that nobody refreshed)."""

    def __init__(self):
        self.before: torch.Tensor | None = None

    def partial(self, output, lse, site):
        stale, self.before = self.before, lse.clone()
        return output, stale if stale is not None and stale.shape == lse.shape else lse


@fault("stale-shard")
class StaleShard(Fault):
    """One rank sends the layer's partial of the step before (as TensorRT-LLM#10141: a buffer that is not static)."""

    def __init__(self):
        self.kept: dict = {}

    def partial(self, output, lse, site):
        if site.kvp_rank != 1:
            return output, lse
        return _before(self.kept, (site.layer, "output"), output), _before(self.kept, (site.layer, "lse"), lse)


@fault("empty-shard-counts")
class EmptyShardCounts(Fault):
    """An empty shard is merged with weight exp(0): its -inf was never written (vllm#38416)."""

    def partial(self, output, lse, site):
        return output, torch.where(torch.isinf(lse), 0.0, lse)


@fault("empty-shard-nan")
class EmptyShardNan(Fault):
    """An empty shard sends 0/0 (as sglang#36990)."""

    def partial(self, output, lse, site):
        empty = torch.isinf(lse)
        nan = torch.tensor(float("nan"))
        return torch.where(empty[..., None], nan, output), torch.where(empty, nan, lse)


@fault("last-row-repeats")
class LastRowRepeats(Fault):
    """The last row of a batch gets the merged output of the row before: a padded batch cut one row short."""

    def merged(self, output, site):
        return torch.cat([output[:-1], output[-2:-1]]) if len(output) > 1 else output


@fault("stale-merged")
class StaleMerged(Fault):
    """A layer answers with what it merged the step before, where the batch has the same size (vllm#36070)."""

    def __init__(self):
        self.kept: dict = {}

    def merged(self, output, site):
        return _before(self.kept, site.layer, output)
