"""Helix GQA on FLASH_ATTN (CUDA): context over this rank's shard, new tokens over the heads it owns.

Why: stock `_forward_with_dcp` gathers the DCP group's queries, because each rank projects Q/TP heads. Under Helix a
rank has projected all Q/TPA heads of its group already: nothing is gathered, and new tokens are attended on owned heads
only, with the KV heads that these read (a group may own part of one KV head, or several).
Hook: `FlashAttentionImpl._forward_with_dcp`; its `do_kv_cache_update`, where tokens are counted for the proof of path;
`FlashAttentionMetadataBuilder.__init__`, whose scheduler multiplies the layer's query heads by DCP, which Helix's
layers hold already; its `build`, which leaves the context out where no request has any: the dummy requests that a FULL
CUDA graph is captured with have none, and every replay would leave it out.
Upstream: vllm `v1/attention/backends/flash_attn.py`.
Remove when: that backend takes Q/TPA heads.
"""

from vllm.v1.attention.backends import flash_attn as upstream

from helix_runtime.overlap import lanes_of, micro_batches, overlapped
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.cuda_combine import capturing, combined, count_written
from helix_runtime.vllm_plugin.owned_kv_heads import owned_kv_heads

_MODULE = "vllm.v1.attention.backends.flash_attn"


def install() -> None:
    patch(f"{_MODULE}:FlashAttentionImpl._forward_with_dcp", _forward_with_dcp)
    patch(f"{_MODULE}:FlashAttentionImpl.do_kv_cache_update", _do_kv_cache_update)
    patch(f"{_MODULE}:FlashAttentionMetadataBuilder.__init__", _builder_init)
    patch(f"{_MODULE}:FlashAttentionMetadataBuilder.build", _build)


def _builder_init(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        context = current()
        if context.helix:
            assert self.num_heads_q % context.kvp == 0, (self.num_heads_q, context.kvp)
            self.num_heads_q //= context.kvp

    return __init__


def _build(original):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if current().helix and self.use_full_cuda_graph:
            # Whether any request has context is told by this bound. Without it all have: a graph holds the exchange,
            # and a step that replays it has its schedule, with empty shards where there is no context.
            common_attn_metadata = common_attn_metadata.replace(seq_lens_cpu_upper_bound=None)
        return original(self, common_prefix_len, common_attn_metadata, fast_build)

    return build


def _forward_with_dcp(original):
    def forward_with_dcp(self, query, key, value, key_cache, value_cache, output, attn_metadata, **descales):
        context = current()
        if not attn_metadata.max_dcp_context_kv_len:  # new requests only: no one combines
            context.proof.ran("prefill", combined=False, captured=capturing())
        _count_combine(self).phase = "decode" if attn_metadata.max_query_len == 1 else "prefill"
        if not context.helix:
            return original(self, query, key, value, key_cache, value_cache, output, attn_metadata, **descales)
        return _helix(self, query, key, value, key_cache, value_cache, output, attn_metadata)

    return forward_with_dcp


class _Counted:
    """An implementation's combine, counted with the attention before it where it is called, and only if it is."""

    def __init__(self, combine):
        self.combine, self.phase = combine, "prefill"

    def __call__(self, *partial, **how):
        return combined(self.phase, self.combine, *partial, **how)


def _count_combine(impl) -> _Counted:
    """The counted combine of `impl`, put there at its first call: before any graph is captured."""
    if not isinstance(impl.dcp_combine, _Counted):
        impl.dcp_combine = _Counted(impl.dcp_combine)
    return impl.dcp_combine


def _helix(impl, query, key, value, key_cache, value_cache, output, metadata):
    """query [T, Q/TPA, D], key and value [T, K/TPA, D] of the new tokens -> output [T, Q/TP, D], in place.

    With `helix.overlap` a decode batch is cut into micro-batches, the exchange of one under the attention of the next.
    """
    context = current()
    owned = query.shape[1] // context.kvp
    mine = slice(context.kvp_rank * owned, (context.kvp_rank + 1) * owned)
    heads = owned_kv_heads(query.shape[1], key.shape[1], context.kvp, context.kvp_rank)
    common = {
        "cu_seqlens_q": metadata.query_start_loc,
        "max_seqlen_q": metadata.max_query_len,
        "softmax_scale": impl.scale,
        "softcap": impl.logits_soft_cap,
        "return_softmax_lse": True,
        "fa_version": impl.vllm_flash_attn_version,
        "num_splits": metadata.max_num_splits,
    }
    new_output, new_lse = upstream.flash_attn_varlen_func(
        q=query[:, mine].contiguous(),
        k=key[:, heads].contiguous(),
        v=value[:, heads].contiguous(),
        cu_seqlens_k=metadata.query_start_loc,
        max_seqlen_k=metadata.max_query_len,
        causal=metadata.causal,
        **common,
    )
    if metadata.max_dcp_context_kv_len == 0:  # the same on every rank: no one combines
        return output.copy_(new_output)
    slices = [slice(None)]
    if metadata.max_query_len == 1 and len(query) == len(metadata.dcp_context_kv_lens):  # one token a request
        slices = micro_batches(len(query), context.micro_batches)
    cut = len(slices) > 1

    def starts(part: slice):
        """Of a micro-batch's tokens, one a request, which are counted like those of the first requests."""
        return metadata.query_start_loc[: part.stop - part.start + 1] if cut else metadata.query_start_loc

    def attend(_, part: slice):
        return upstream.flash_attn_varlen_func(
            q=query[part].contiguous(),
            k=key_cache,
            v=value_cache,
            seqused_k=metadata.dcp_context_kv_lens[part],
            max_seqlen_k=metadata.max_dcp_context_kv_len,
            causal=False,
            block_table=metadata.block_table[part],
            scheduler_metadata=None if cut else metadata.scheduler_metadata,  # made for the whole batch
            **{**common, "cu_seqlens_q": starts(part)},
        )

    def exchange(_, part: slice, partial) -> None:
        merged, merged_lse = impl.dcp_combine(
            partial[0],
            partial[1].transpose(0, 1).contiguous(),
            upstream.get_dcp_group(),
            return_lse=True,
            seq_lens=metadata.dcp_context_kv_lens[part],
            query_start_loc=starts(part),
        )
        upstream.merge_attn_states(
            output[part],
            merged,
            merged_lse.transpose(0, 1).contiguous(),
            new_output[part],
            new_lse[:, part].contiguous(),
        )
        if cut:
            context.proof.overlapped()

    overlapped(slices, attend, exchange, lanes_of(query.device))
    return output


def _do_kv_cache_update(original):
    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        original(self, layer, key, value, kv_cache, slot_mapping)
        count_written(slot_mapping)

    return do_kv_cache_update
