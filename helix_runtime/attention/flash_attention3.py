"""FLASH_ATTN on Hopper: FlashAttention 3's paged decode, for GQA and, with queries in two parts, for MLA."""

from dataclasses import dataclass
from functools import cache

import torch

from helix_runtime.attention.libraries import load, require_hopper

_LIBRARY = "vllm_flash_attn/_vllm_fa3_C"


@cache
def _empty(device: torch.device) -> torch.Tensor:
    """-inf on the device: a captured graph cannot read it from the host."""
    return torch.tensor(float("-inf"), device=device)


@dataclass(frozen=True)
class FlashAttention3:
    """GQA. Cache [blocks, 2, block_size, Hkv, D], keys then values, any strides but the last; bf16 or fp16.

    splits: runs into which the kernel cuts a context, 0 for its own choice. Where a rank has one KV head, or sends one
    head to each peer, the kernel writes its output straight into a send buffer (`send`).
    """

    scale: float
    softcap: float | None = None
    splits: int = 0
    name: str = "FLASH_ATTN"
    needs_plan = False
    settles_empty = False

    def __post_init__(self):
        require_hopper(self.name)
        load(_LIBRARY)

    def decode(self, query, kv_cache, block_table, lengths):
        """query [T, Hq, D], lengths int32 [T] -> (output [T, Hq, D], the kernel's lse [T, Hq] fp32)."""
        keys, values = kv_cache.unbind(1)
        found, lse = _forward(
            query.unsqueeze(1),
            keys,
            values,
            None,
            None,
            block_table,
            lengths,
            self.scale,
            self.softcap,
            self.splits,
        )
        return found.squeeze(1), lse.squeeze(2)

    def sends(self, heads: int, kv_heads: int, ranks: int) -> bool:
        """Whether `send` fits: heads must be addressable by one stride in the source and in the send buffer."""
        return kv_heads == 1 or heads == ranks

    def send(self, query, kv_cache, block_table, lengths, outputs, lses) -> None:
        """Attention straight into a send buffer: outputs [N, T, Hq / N, D]; lses [N, T, Hq / N] are copied after it.

        The heads of one KV head are passed as so many query tokens: without a causal mask they see the same keys, and
        a token has a stride of its own, which a head sent to another rank needs.
        """
        ranks, _rows, each, _dim = outputs.shape
        keys, values = kv_cache.unbind(1)
        if keys.shape[2] == 1:  # [T, N tokens, Hq / N heads, D]
            grouped = query.unflatten(1, (ranks, each))
            target = outputs.transpose(0, 1)
        else:  # one head a peer: [T, Hq / Hkv tokens, Hkv heads, D]
            grouped = query.unflatten(1, (keys.shape[2], -1)).transpose(1, 2)
            target = outputs[:, :, 0].unflatten(0, (keys.shape[2], -1)).permute(2, 1, 0, 3)
        _, lse = _forward(
            grouped, keys, values, None, target, block_table, lengths, self.scale, self.softcap, self.splits
        )
        # lse [T, heads, tokens] -> [N, T, Hq / N]
        lse = lse.permute(2, 0, 1) if keys.shape[2] == 1 else lse.permute(1, 2, 0).flatten(0, 1).unsqueeze(2)
        # An empty shard's rows are what the kernel left there: with an lse of -inf nobody reads them.
        torch.where(lengths[None, :, None] > 0, lse, _empty(lse.device), out=lses)


@dataclass(frozen=True)
class FlashAttention3MLA:
    """MLA. Cache of latents [blocks, block_size, 512 + 64], query [T, H, 512 + 64]."""

    scale: float
    value_dim: int = 512
    splits: int = 0
    name: str = "FLASH_ATTN_MLA"
    needs_plan = False
    settles_empty = False

    def __post_init__(self):
        require_hopper(self.name)
        load(_LIBRARY)

    def decode(self, query, kv_cache, block_table, lengths):
        """As `FlashAttention3.decode`; output [T, H, 512]."""
        latents = kv_cache.unsqueeze(2)
        found, lse = _forward(
            query[..., self.value_dim :].unsqueeze(1),
            latents[..., self.value_dim :],
            latents[..., : self.value_dim],
            query[..., : self.value_dim].unsqueeze(1),
            None,
            block_table,
            lengths,
            self.scale,
            None,
            self.splits,
        )
        return found.squeeze(1), lse.squeeze(2)


def _forward(query, keys, values, query_values, out, block_table, lengths, scale, softcap, splits):
    """query [T, tokens, heads, D] -> (output, lse [T, heads, tokens]); every token sees all `lengths` keys."""
    if out is not None and any(stride % 8 for stride in out.stride()[:-1]):
        raise ValueError(f"the output's strides {out.stride()} are not multiples of 16 bytes")
    output, lse, _, _ = torch.ops._vllm_fa3_C.fwd(
        query,
        keys,
        values,
        None,  # new keys
        None,  # new values
        query_values,
        out,
        None,  # cu_seqlens_q
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new
        None,  # seqused_q
        lengths,
        None,  # max_seqlen_q
        None,  # max_seqlen_k
        block_table,
        None,  # kv_batch_idx
        None,  # leftpad_k
        None,  # rotary cos
        None,  # rotary sin
        None,  # rotary lengths
        None,  # q_descale
        None,  # k_descale
        None,  # v_descale
        scale,
        False,  # causal
        -1,  # window, left
        -1,  # window, right
        softcap or 0.0,
        True,  # rotary interleaved
        None,  # scheduler metadata
        splits,
        None,  # pack_gqa
        0,  # sm_margin
        None,  # sinks
        1,  # cp_world_size
        0,  # cp_rank
        None,  # cp_tot_seqused_k
    )
    return output, lse
