"""What the rounding of a merge changes: two formulas in fp32, emulated in torch, without a server.

    python -m benchmarks.merge_rounding

Ours weigh a shard by its softmax over the LSEs. vLLM's `ag_rs` (`correct_attn_out`, and ours until 2026-11-26) weighs
it by exp(lse - merged lse), and the merged LSE is rounded to fp32 first. Printed: the largest change, in nats, of a
top-20 logprob against attention that is not sharded.
"""

import math

import numpy as np
import torch

from harness.models import network
from harness.models.recipe import find

MODELS = ("llama-retrieve-k2", "llama-retrieve-k3-q24", "llama-k2", "llama-k4")
LENGTHS = (1, 3, 5, 17, 33, 64, 65, 100, 129, 200, 400)
WEIGHTS = {
    "softmax over the LSEs": lambda lses: lses.softmax(0),
    "exp(lse - merged lse)": lambda lses: (lses - lses.logsumexp(0)).exp(),
}
torch.set_num_threads(1)


def main() -> None:
    random = np.random.default_rng(0)
    for name in MODELS:
        recipe = find(f"recipe:{name}")
        net, largest = network.Network(recipe, dtype=torch.float32), [0.0]
        changes: dict[str, list[float]] = {kind: [] for kind in WEIGHTS}
        for length in LENGTHS * 3:
            tokens = tuple(int(token) for token in random.integers(2, recipe.vocab, length))
            last = min(length, 16)
            whole = net.logprobs(tokens, last)
            top = np.argsort(whole, -1)[:, -20:]
            for kind, weigh in WEIGHTS.items():
                network._merged = merged(weigh, largest)
                row = net.logprobs(tokens, last, network.Wound(merge="right", kvp=2, interleave=1))
                changed = np.abs(np.take_along_axis(whole, top, -1) - np.take_along_axis(row, top, -1))
                changes[kind].append(float(changed.max()))
        print(f"{name}: largest LSE {largest[0]:.0f}")
        for kind, found in changes.items():
            print(f"  {kind}: largest {max(found):.1e}, median of {len(found)} prompts {np.median(found):.1e}")


def merged(weigh, largest):
    """`network._merged` with the weights of one formula: partials of each shard by softmax, then weighed and summed."""

    def merge(scores, values, sees, wound):
        outputs, lses = [], []
        for rank in range(wound.kvp):
            mine = network.owner(sees, wound.kvp, wound.interleave) == rank
            own = scores[..., mine]
            empty = torch.full((*own.shape[:-1], 1), -math.inf)
            lses.append(own.logsumexp(-1, keepdim=True) if own.shape[-1] else empty)
            outputs.append(own.softmax(-1).nan_to_num(0.0) @ values[:, :, mine])
        stacked = torch.stack(lses)
        largest[0] = max(largest[0], float(stacked[stacked.isfinite()].abs().max()))
        return (weigh(stacked) * torch.stack(outputs)).sum(0)

    return merge


if __name__ == "__main__":
    main()
