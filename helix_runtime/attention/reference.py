"""Partial attention in plain torch: the compute of our CPU backends, and what CUDA backends are tested against.

One code path serves prefill, chunked prefill, prefix hits, decode, mixed batches and empty shards, because the mask is
on global positions: the query at position p sees those local keys whose global position is at most p.
"""

from dataclasses import dataclass

import torch

from helix_runtime.attention.paged import PagedShard, split_cpu_kv_cache
from helix_runtime.sharding import local_lengths

#: Bound on the scores held at a time, in bytes; a single query token may exceed it.
SCORE_BYTES = 64 * 2**20


def paged_partial_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    local_seq_lens: torch.Tensor | None = None,
    kvp: int,
    kvp_rank: int,
    interleave: int = 1,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    accumulate: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch's new tokens over this rank's shard of the KV cache.

    query: [T, Hq, D], request after request; rows past `query_start_loc[-1]` are padding.
    key_cache: [blocks, Hkv, block_size, D], value_cache: [blocks, Hkv, block_size, Dv]; any strides, never copied
        whole; Hkv divides Hq, and query head h reads KV head h // (Hq / Hkv). MLA: Hkv = 1, D = 576, and value_cache
        is the view `key_cache[..., :512]`, which is then gathered once.
    block_table: integer [R, max_blocks]; query_start_loc: integer [R + 1]; seq_lens: integer [R], global lengths, the
        new tokens included, whose keys are already in the cache.
    local_seq_lens: integer [R], tokens of each request in this shard; derived from seq_lens if not given.
    causal: False lets every query see every local key. softcap: scores become softcap * tanh(scores / softcap).
    accumulate: dtype of scores and sums; fp32, or fp64 for fp64 queries.

    Returns (output [T, Hq, Dv] in the dtype of query, lse [T, Hq], natural log, fp32, or fp64 for fp64 queries). A row
    that sees no local key, padding included, has output 0 and lse -inf.

    Raises ValueError if heads, lengths or the block table do not fit together.
    """
    tokens, heads, _ = query.shape
    kv_heads = key_cache.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    wide = query.dtype == torch.float64
    accumulate = accumulate or (torch.float64 if wide else torch.float32)
    output = query.new_zeros(tokens, heads, value_cache.shape[3])
    lse = query.new_full((tokens, heads), float("-inf"), dtype=torch.float64 if wide else torch.float32)
    visible = local_lengths(seq_lens, kvp, kvp_rank, interleave)
    if local_seq_lens is None:
        local_seq_lens = visible
    elif causal:  # a key past the last query is hidden anyway
        local_seq_lens = torch.minimum(local_seq_lens, visible)
    starts, lengths, counts = query_start_loc.tolist(), seq_lens.tolist(), local_seq_lens.tolist()
    shard = PagedShard(key_cache, value_cache, block_table, accumulate)

    if shard.fits_one_batch(starts, counts):
        # One new token a request, at the last position: it sees every local key, so the lengths are the whole mask.
        keys, values, hidden = shard.gather_batch(counts)
        grouped = query[: len(counts)].to(accumulate).unflatten(1, (kv_heads, -1))
        part, part_lse = _attend(grouped, keys, values, hidden, scale, softcap)
        output[: len(counts)] = part.flatten(1, 2)
        lse[: len(counts)] = part_lse.flatten(1, 2)
        return output, lse

    for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        start, end = starts[request : request + 2]
        first = length - (end - start)
        if first < 0:
            raise ValueError(f"request {request} has {end - start} new tokens, but a length of {length}")
        if count == 0 or start == end:
            continue
        keys, values = shard.gather(request, count)
        step = max(1, SCORE_BYTES // (heads * count * accumulate.itemsize))
        for low in range(start, end, step):
            high = min(low + step, end)
            # A shard is stored in order of position, so the keys that a query sees are a prefix of it.
            position = torch.arange(first + low - start, first + high - start, device=query.device)
            seen = local_lengths(position + 1, kvp, kvp_rank, interleave).clamp(max=count)
            seen = seen if causal else torch.full_like(seen, count)
            least, most = int(seen.min()), int(seen.max())
            if most == 0:
                continue
            hidden = None
            if least < most:
                hidden = torch.arange(most, device=query.device) >= seen.repeat_interleave(heads // kv_heads)[:, None]
            # [Hkv, queries * group, D]: GQA by stacking the queries of a KV head, not by repeating the KV head.
            stacked = query[low:high].to(accumulate).unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
            part, part_lse = _attend(stacked, keys[:, :most], values[:, :most], hidden, scale, softcap)
            output[low:high] = part.unflatten(1, (high - low, -1)).transpose(0, 1).flatten(1, 2)
            lse[low:high] = part_lse.unflatten(1, (high - low, -1)).transpose(0, 1).flatten(1, 2)
    return output, lse


@dataclass(frozen=True)
class ReferenceAttention:
    """`PartialAttention` by `paged_partial_attention`.

    kv_cache is vLLM's CPU layout [blocks, Hkv, block_size, 2 * D] (see `split_cpu_kv_cache`), or for MLA
    (`latent_value_dim`, 512 for DeepSeek) the latents [blocks, block_size, 576].
    """

    kvp: int
    kvp_rank: int
    interleave: int
    scale: float
    softcap: float | None = None
    latent_value_dim: int | None = None

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
        """See `PartialAttention.partial`."""
        if self.latent_value_dim is None:
            keys, values = split_cpu_kv_cache(kv_cache)
        else:
            keys = kv_cache.unsqueeze(1)
            values = keys[..., : self.latent_value_dim]
        return paged_partial_attention(
            query,
            keys,
            values,
            block_table,
            query_start_loc,
            seq_lens,
            local_seq_lens=local_lengths,
            kvp=self.kvp,
            kvp_rank=self.kvp_rank,
            interleave=self.interleave,
            scale=self.scale,
            causal=causal,
            softcap=self.softcap,
        )


def dense_attention_fp64(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one whole sequence in fp64, written for clarity: the reference of tests.

    query: [T, Hq, D], the last T tokens of the sequence; key: [S, Hkv, D]; value: [S, Hkv, Dv]. Returns (output
    [T, Hq, Dv], lse [T, Hq]), both fp64, natural log.
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("thd,shd->hts", query, key.repeat_interleave(group, dim=1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        new, total = query.shape[0], key.shape[0]
        position = torch.arange(total - new, total, device=query.device)
        hidden = torch.arange(total, device=query.device) > position[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    output = torch.einsum("hts,shd->thd", scores.softmax(-1), value.repeat_interleave(group, dim=1))
    return output, scores.logsumexp(-1).T


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, lse) of query [..., rows, D] over keys [..., L, D], where hidden ([..., rows, L]) is False."""
    scores = (query * scale) @ keys.transpose(-1, -2)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    # A row that sees nothing has -inf as its maximum, and -inf - -inf is NaN: subtract 0 there.
    weights = scores.sub_(top.masked_fill(top == float("-inf"), 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.masked_fill(total == 0, 1.0)
    return output, (top + total.log()).squeeze(-1)
