"""HELIX_CPU_MLA: latent attention for vLLM's CPU platform that returns its LSE, and a combine that runs there.

Why: stock CPU MLA returns no LSE and pins its context-parallel size to 1; upstream's combines are Triton kernels, and
its gather of a shard's cached latents, which a prefill over context starts with, is a CUDA kernel.
Hook: `CpuPlatform.get_attn_backend_cls` (shared with `cpu_attention.py`); `MLADCPManager._init_combine`;
`_custom_ops.cp_gather_cache`. The query all-gather, the up-projections and prefill stay upstream's.
Upstream: vllm `v1/attention/backends/mla/cpu_mla.py`, `v1/attention/ops/dcp.py`.
Remove when: CPU MLA has `can_return_lse_for_decode` and the combines have CPU versions.
"""

import torch
from vllm._custom_ops import gather_mla_context_cache_cpu
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from helix_runtime.attention.reference import paged_partial_attention
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current


def install() -> None:
    patch("vllm.v1.attention.ops.dcp:MLADCPManager._init_combine", _init_combine)
    patch("vllm._custom_ops:cp_gather_cache", _cp_gather_cache)


def _cp_gather_cache(original):
    def cp_gather_cache(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts=None):
        """Copy each request's rows `[start, start + n)` of this rank's shard, [blocks, block, D], to dst [sum n, D]."""
        if src_cache.device.type != "cpu":
            return original(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts)
        starts = torch.zeros(batch_size, dtype=torch.long) if seq_starts is None else seq_starts
        gather_mla_context_cache_cpu(
            src_cache=src_cache, dst=dst, block_table=block_table, starts=starts, cu_seq_lens=cu_seq_lens
        )
        context, lengths = current(), cu_seq_lens.diff()
        kept = context.fault.local_lengths(lengths, context.site)
        for end, lost in zip(cu_seq_lens[1:].tolist(), (lengths - kept).tolist(), strict=True):
            dst[end - lost : end] = 0  # only a deliberate defect loses any

    return cp_gather_cache


def _init_combine(original):
    def init_combine(self, num_heads, head_dim, dtype, is_lse_base_on_e, use_pcp):
        def combine(partial_output, partial_lse, *, seq_lens, query_start_loc):
            context = current()
            context.proof.count("decode_combine")
            merged = context.combine(partial_output, partial_lse)
            if context.capture:
                context.capture.check(context, context.site, **context.to_check, merged=merged)
            return merged

        return combine

    return init_combine


class HelixCPUMLABackend(CPUMLABackend):
    """Keeps the name CPU_MLA inside vLLM, whose registry of names is closed; reports call it HELIX_CPU_MLA."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0

    @staticmethod
    def get_impl_cls():
        return HelixCPUMLAImpl


class HelixCPUMLAImpl(CPUMLAImpl):
    """Decode over the local shard of latents: one KV head of kv_lora_rank + rope values, read by every query head.

    Prefill is upstream's: each rank attends with the heads it owns, to the new tokens and to the context, which it
    gathers from the shards of its group; nothing is merged between ranks.
    """

    can_return_lse_for_decode = True
    supports_dcp = True
    lse_base_on_e = True

    def __init__(self, *args, **kwargs):
        kvp, kvp_rank = self.dcp_world_size, self.dcp_rank  # set by __new__, and overwritten by the stock __init__
        super().__init__(*args, **kwargs)
        self.dcp_world_size, self.dcp_rank = kvp, kvp_rank
        self.cp_kv_cache_interleave_size = current().interleave

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """q [B, H, 576] of the whole group -> (output [B, H, 512], natural LSE [B, H]) over this rank's shard."""
        context, decode = current(), attn_metadata.decode
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        each = torch.arange(query.shape[0] + 1)  # one new token a request
        site = context.enter(
            layer.layer_name, len(decode.seq_lens), True, False, decode.dcp_tot_seq_lens, query_start_loc=each
        )
        latents = kv_c_and_k_pe_cache.unsqueeze(1)
        shard = {
            "query": query,
            "key_cache": latents,
            "value_cache": latents[..., : self.kv_lora_rank],
            "block_table": decode.block_table,
            "query_start_loc": each,
            "seq_lens": decode.dcp_tot_seq_lens,
            "scale": self.scale,
        }
        output, lse = paged_partial_attention(
            **context.reads(shard),
            local_seq_lens=context.fault.local_lengths(decode.seq_lens, site),
            kvp=context.kvp,
            kvp_rank=context.kvp_rank,
            interleave=context.interleave,
        )
        if context.capture:
            context.to_check = shard
        context.proof.count("decode_attention")
        context.proof.count("empty_shard", int((decode.seq_lens == 0).sum()))
        return output, lse

    def forward_mha(self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale=None):
        """q [T, h, nope + rope] of the owned heads, new tokens only -> output [T, h * v], in place."""
        context, prefill = current(), attn_metadata.prefill
        cached = prefill.chunked_context
        requests = len(prefill.query_start_loc) - 1
        site = context.enter(self.kv_b_proj.prefix, requests, decode=False, reads_context=cached is not None)
        super().forward_mha(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale)
        context.proof.count("prefill_attention")
        context.proof.count("context_prefill", int(cached is not None))
        if context.capture:
            before = torch.tensor(cached.context_lens_list) if cached else torch.zeros(requests, dtype=torch.long)
            latents = kv_c_and_k_pe_cache.unsqueeze(1)
            context.capture.check(
                context,
                site,
                query=q,
                key_cache=latents,
                value_cache=latents[..., : self.kv_lora_rank],
                block_table=prefill.block_table,
                query_start_loc=prefill.query_start_loc,
                seq_lens=before + prefill.query_start_loc.diff().cpu(),
                scale=self.scale,
                merged=output.view(-1, self.num_heads, self.v_head_dim),
                expand=self._expand,
            )

    def _expand(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [1, n, 512 + rope], [1, n, 512] -> keys [h, n, nope + rope], values [h, n, v] of owned heads."""
        weight = self.kv_b_proj.weight.double().view(self.num_heads, -1, self.kv_lora_rank)
        up = torch.einsum("hdl,nl->hnd", weight, values[0])
        nope, value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        rope = keys[..., self.kv_lora_rank :].expand(self.num_heads, -1, -1)
        return torch.cat([nope, rope], dim=-1), value

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
        proof = current().proof
        proof.count("local_tokens", int((slot_mapping >= 0).sum()))
        proof.count("global_tokens", slot_mapping.numel())
