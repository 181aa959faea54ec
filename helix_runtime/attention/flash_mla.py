"""FLASHMLA: DeepSeek's dense latent decode for Hopper. Blocks of 64, 576-wide bf16 or fp16 latents, 512 values."""

from dataclasses import dataclass

import torch

from helix_runtime.attention.libraries import load, require_hopper

_PAGE = 64


@dataclass(frozen=True)
class FlashMLA:
    """Cache of latents [blocks, 64, 576], query [T, H, 576]. Its schedule is made on the device, from the lengths, in
    every call: nothing is kept that a captured graph could find stale."""

    scale: float
    value_dim: int = 512
    name: str = "FLASHMLA"
    needs_plan = False
    settles_empty = False

    def __post_init__(self):
        require_hopper(self.name)
        load("_flashmla_C")

    def decode(self, query, kv_cache, block_table, lengths):
        """query [T, H, 576], lengths int32 [T] -> (output [T, H, 512], the kernel's lse [T, H] fp32)."""
        if kv_cache.shape[1] != _PAGE:
            raise ValueError(f"FLASHMLA reads blocks of {_PAGE} tokens, not {kv_cache.shape[1]}")
        output, lse, _, _ = torch.ops._flashmla_C.dense_decode_fwd(
            query.unsqueeze(1),
            kv_cache.unsqueeze(2),
            self.value_dim,
            lengths,
            block_table,
            self.scale,
            False,  # causal: one token sees all
            None,
            None,
            None,
        )
        return output.squeeze(1), lse.squeeze(2)
