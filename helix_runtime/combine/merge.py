"""The exact merge of partial attentions: attention over a set of keys is a weighted mean of that over its parts.

With outputs o_n and log-sum-exps l_n of disjoint shards: l = log(sum_n exp(l_n)), o = sum_n exp(l_n - l) * o_n.

What is defined, for each (token, head):
- a partial with lse -inf is empty: it has weight 0, and its output is not read (NaN or stale memory cannot leak);
- all partials empty: output 0, lse -inf;
- lse NaN or +inf: no attention has that, so something is broken, and output and lse are NaN rather than plausible.
  Kernels that write +inf for an empty shard are to be corrected at their own door.
"""

import math
from typing import Literal

import torch

LseBase = Literal["e", "2"]


def merge_partials(outputs: torch.Tensor, lses: torch.Tensor, base: LseBase = "e") -> tuple[torch.Tensor, torch.Tensor]:
    """Merge N partials of the same queries over disjoint keys.

    outputs: [N, B, H, D], floating point; lses: [N, B, H], fp32 or fp64, logarithms of the given base. Returns (output
    [B, H, D] in the dtype of outputs, lse [B, H]): the lse is always a natural logarithm, whatever `base` is.
    Accumulates in fp32 (outputs fp64: in fp64), and the lse has that dtype. The partials are added in the order of
    their index, so equal inputs give equal bits. One partial alone comes back unchanged.

    Raises ValueError for shapes, lse dtypes or bases that do not fit. Source: Helix paper (arXiv 2507.07120), section
    2.1.1, and the flash-decoding rescale that it cites.
    """
    if outputs.shape[:-1] != lses.shape or outputs.ndim != 4 or not len(lses):
        raise ValueError(f"outputs {tuple(outputs.shape)} and lses {tuple(lses.shape)} are not [N, B, H, D], [N, B, H]")
    accumulate = accumulate_dtype(outputs.dtype)
    lses = natural(lses, base, accumulate)
    top = _finite_top(lses)
    weights = (lses - top).exp()
    total = weights[0].clone()
    output = _weighted(outputs[0], lses[0], weights[0])
    for n in range(1, len(lses)):
        total += weights[n]
        output += _weighted(outputs[n], lses[n], weights[n])
    output /= total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return output.to(outputs.dtype), top + total.log()


def scale_partial(output: torch.Tensor, lses: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of partial `rank` in the merged output, unreduced: (share [B, H, D], merged lse [B, H]), both of the
    dtype of `lses`. The shares of all partials sum to the merged output.

    output: [B, H, D] of partial `rank`; lses: [N, B, H] of all, natural. Its weight is exp(l - top) over the sum of
    all, so that weights sum to 1 as closely as fp32 tells. exp(l - merged lse) would not: an LSE of 400 is rounded by
    1.5e-5, and all weights with it.
    """
    top = _finite_top(lses)
    weights = (lses - top).exp()
    total = weights.sum(0)
    weight = weights[rank] / total.masked_fill(total == 0, 1.0)
    return _weighted(output, lses[rank], weight), top + total.log()


def natural(lses: torch.Tensor, base: LseBase, dtype: torch.dtype) -> torch.Tensor:
    """`lses` as natural logarithms of `dtype`. Raises ValueError for a base but "e" or "2", or an lse below fp32."""
    if base not in ("e", "2"):
        raise ValueError(f'lse base {base!r} is neither "e" nor "2"')
    check_lse_dtype(lses)
    lses = lses.to(torch.promote_types(lses.dtype, dtype))  # before the product, which would round
    return (lses * math.log(2.0) if base == "2" else lses).to(dtype)


def check_lse_dtype(lse: torch.Tensor) -> None:
    """Raises ValueError unless the lse is fp32 or fp64."""
    if lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse is {lse.dtype}; it must be fp32 or fp64, as rounding it rescales whole rows")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _finite_top(lses: torch.Tensor) -> torch.Tensor:
    """Maximum over the partials, with 0 for -inf: -inf - -inf would be NaN."""
    top = lses.amax(0)
    return top.masked_fill(top == float("-inf"), 0.0)


def _weighted(output: torch.Tensor, lse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight * output, where an empty partial's output is replaced, not multiplied: 0 * NaN is NaN."""
    return output.to(weight.dtype).masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0) * weight.unsqueeze(-1)
