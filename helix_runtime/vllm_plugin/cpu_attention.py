"""HELIX_CPU: an attention backend for vLLM's CPU platform that returns its LSE, so that context parallelism can run.

Why: stock CPU attention returns no LSE; without it no context parallelism runs on a machine without a GPU, and nothing
about Helix could be tested there.
Hook: `CpuPlatform.get_attn_backend_cls` (an out-of-tree platform would displace the real one; only one may be active).
Upstream: vllm `v1/attention/backends/cpu_attn.py`.
Remove when: vLLM's CPU backend has `can_return_lse_for_decode`.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from helix_runtime.attention.reference import paged_partial_attention
from helix_runtime.overlap import lanes_of, micro_batches, overlapped
from helix_runtime.sharding import local_lengths
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current


def install() -> None:
    patch("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls", _get_attn_backend_cls)


def _get_attn_backend_cls(original):
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if attn_selector_config.use_mla:
            return "helix_runtime.vllm_plugin.cpu_mla.HelixCPUMLABackend"
        return f"{__name__}.HelixCPUBackend"

    return get_attn_backend_cls


class HelixCPUBackend(CPUAttentionBackend):
    """Keeps the name CPU_ATTN inside vLLM, whose registry of names is closed; reports call it HELIX_CPU."""

    @staticmethod
    def get_impl_cls():
        return HelixCPUAttentionImpl

    @staticmethod
    def get_builder_cls():
        return HelixCPUMetadataBuilder


@dataclass(frozen=True)
class HelixCPUMetadata:
    """One batch. seq_lens [R] are global, new tokens included; local_seq_lens [R] count this rank's shard."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    local_seq_lens: torch.Tensor
    block_table: torch.Tensor
    empty_shards: int
    reads_context: bool

    @property
    def decode_only(self) -> bool:
        return self.max_query_len == 1


class HelixCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> HelixCPUMetadata:
        common, context = common_attn_metadata, current()
        requests = common.num_reqs
        seq_lens = common.seq_lens[:requests]
        local = local_lengths(seq_lens, context.kvp, context.kvp_rank, context.interleave)
        new = common.query_start_loc[1 : requests + 1] - common.query_start_loc[:requests]
        return HelixCPUMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc[: requests + 1],
            seq_lens=seq_lens,
            local_seq_lens=local,
            block_table=common.block_table_tensor[:requests],
            empty_shards=int((local == 0).sum()),
            reads_context=bool(((new > 1) & (seq_lens > new)).any()),
        )


class HelixCPUAttentionImpl(CPUAttentionBackendImpl):
    """Partial attention over the local shard, then the combine. Standard DCP gathers the group's queries first."""

    can_return_lse_for_decode = True
    supports_dcp = True
    lse_base_on_e = True

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query [T, heads, D] -> output [T, owned heads, D], in place. The cache already holds key and value."""
        if attn_metadata is None:  # warming up
            return output.zero_()
        context, tokens, metadata = current(), attn_metadata.num_actual_tokens, attn_metadata
        site = context.enter(
            layer.layer_name,
            len(metadata.seq_lens),
            metadata.decode_only,
            metadata.reads_context,
            metadata.seq_lens,
            metadata.query_start_loc,
        )
        query = query[:tokens]
        if not context.helix:
            query = _gather_queries(query)
        shard = {
            "query": query,
            "key_cache": kv_cache[..., : self.head_size],
            "value_cache": kv_cache[..., self.head_size :],
            "block_table": metadata.block_table,
            "query_start_loc": metadata.query_start_loc,
            "seq_lens": metadata.seq_lens,
            "scale": self.scale,
        }
        read = context.reads(shard)
        local_seq_lens = context.fault.local_lengths(metadata.local_seq_lens, site)
        common = {
            "kvp": context.kvp,
            "kvp_rank": context.kvp_rank,
            "interleave": context.interleave,
            "softcap": self.logits_soft_cap or None,
        }
        requests, calls = len(metadata.seq_lens), 1
        if context.micro_batches > 1 and metadata.decode_only and tokens == requests > 1:
            merged = output[:tokens]
            calls = _overlapped(context, read, local_seq_lens, common, merged)
        else:
            merged = context.combine(*paged_partial_attention(**read, local_seq_lens=local_seq_lens, **common))
            output[:tokens] = merged
        if context.capture:
            context.capture.check(context, site, **shard, merged=merged)
        phase = "decode" if site.decode else "prefill"
        context.proof.count(f"{phase}_attention", calls)
        context.proof.count(f"{phase}_combine", calls)
        context.proof.count("context_prefill", int(metadata.reads_context))
        context.proof.count("empty_shard", metadata.empty_shards)
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        """Write the tokens that this rank owns (slot >= 0); cache [blocks, Hkv, block, 2D], keys then values."""
        mine = (slot_mapping >= 0).nonzero().flatten()
        slots = slot_mapping[mine]
        block_size = kv_cache.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        kv_cache[blocks, :, offsets, : self.head_size] = key[mine]
        kv_cache[blocks, :, offsets, self.head_size :] = value[mine]
        proof = current().proof
        proof.count("local_tokens", mine.numel())
        proof.count("global_tokens", slot_mapping.numel())


def _overlapped(context, read: dict, local_seq_lens: torch.Tensor, common: dict, merged: torch.Tensor) -> int:
    """A decode batch, one token a request, in micro-batches, as many as are returned: the exchange of one beside the
    attention of the next."""

    def attend(index: int, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        rows = {name: read[name][part] for name in ("query", "block_table", "seq_lens")}
        starts = torch.arange(part.stop - part.start + 1, dtype=read["query_start_loc"].dtype)
        return paged_partial_attention(
            **{**read, **rows, "query_start_loc": starts}, local_seq_lens=local_seq_lens[part], **common
        )

    def exchange(index: int, part: slice, partial: tuple[torch.Tensor, torch.Tensor]) -> None:
        merged[part] = context.combine(*partial)
        context.proof.overlapped()

    slices = micro_batches(len(merged), context.micro_batches)
    overlapped(slices, attend, exchange, lanes_of(merged.device))
    return len(slices)


def _gather_queries(query: torch.Tensor) -> torch.Tensor:
    """[T, h, D] of every rank of the KVP group -> [T, KVP * h, D] in rank order: stock DCP's query all-gather."""
    from vllm.distributed.parallel_state import get_dcp_group

    return get_dcp_group().all_gather(query.contiguous(), dim=1)
