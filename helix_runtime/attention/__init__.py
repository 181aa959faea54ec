"""Partial attention: attention over one rank's shard of the KV cache, with the log-sum-exp that a combine needs.

`reference` is the plain torch implementation, which our CPU backends run; `paged` reads the cache for it. Each CUDA
backend adds a file of its own.
"""

from typing import Protocol

import torch

from helix_runtime.attention.paged import split_cpu_kv_cache
from helix_runtime.attention.reference import ReferenceAttention, dense_attention_fp64, paged_partial_attention


class PartialAttention(Protocol):
    """One backend's attention over the local shard of a paged, interleaved KV cache.

    An implementation is bound to one attention layer's geometry (heads, scale, soft cap) and to its place in the KVP
    group (kvp, kvp_rank, interleave; see `helix_runtime.sharding`). It owes its callers three things that kernels
    differ in, and settles them at its own door:

    - the LSE is the natural logarithm, in fp32 (fp64 for fp64 queries): a kernel that returns base 2 is converted;
    - a row that sees no local key has output 0 and LSE -inf, whatever the kernel writes there (0/0, +inf, stale
      memory): a shard is empty whenever the visible length is at most interleave * kvp_rank;
    - a query sees the local keys at global positions up to its own, also in the middle of a prefill.
    """

    def partial(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        local_lengths: torch.Tensor,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        causal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of `query` over this rank's keys.

        query: [T, Hq, D], the new tokens of all requests one after another, Hq = Q / TPA; kv_cache: in the backend's
        own layout, new tokens already written; block_table: int32 [R, max_blocks], the same on every rank;
        local_lengths: int32 [R], tokens of each request in this shard, new ones included; query_start_loc: int32
        [R + 1]; seq_lens: int32 [R], global lengths, new tokens included.

        Returns (output [T, Hq, Dv] in the dtype of query, lse [T, Hq]).
        """
        ...


__all__ = [
    "PartialAttention",
    "ReferenceAttention",
    "dense_attention_fp64",
    "paged_partial_attention",
    "split_cpu_kv_cache",
]
