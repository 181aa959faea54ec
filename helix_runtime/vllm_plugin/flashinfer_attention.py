"""Helix GQA on FLASHINFER (CUDA): context over this rank's shard, new tokens over the heads it owns.

Why: the stock backend gathers the DCP group's queries, plans its kernels for DCP times the layer's query heads, and
attends new tokens on all KV heads of the layer. Under Helix a rank has projected all Q/TPA heads of its group already,
and owns 1/KVP of them after the exchange; with the stock plan it would read KV heads of other queries.
Hook: what the backend is built from, never its arithmetic. `FlashInferMetadataBuilder.__init__` (query heads are
divided by KVP, so that the product is right again); `get_dcp_group` as that module sees it (a gather of queries gives
back the queries); `BatchDCPPrefillWrapper.__init__` (new tokens on owned heads; the combine is counted);
`FlashInferImpl.__init__` (the decode combine is counted); its `do_kv_cache_update`, where tokens are counted. In the
wrapper and the builder's `_get_decode_wrapper` FlashInfer's schedules go to plain memory (`schedule_in_plain_memory`).
Upstream: vllm `v1/attention/backends/flashinfer.py`, whose combines are told base 2 by their call sites.
Remove when: that backend takes Q/TPA heads.
"""

from vllm.v1.attention.backends import flashinfer as upstream

from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.cuda_combine import combined, count_written
from helix_runtime.vllm_plugin.flashinfer_wrappers import OwnedHeads, QueriesAreThere, schedule_in_plain_memory

_MODULE = "vllm.v1.attention.backends.flashinfer"
_real_group = upstream.get_dcp_group


def install() -> None:
    patch(f"{_MODULE}:FlashInferMetadataBuilder.__init__", _builder_init)
    patch(f"{_MODULE}:BatchDCPPrefillWrapper.__init__", _wrapper_init)
    patch(f"{_MODULE}:FlashInferImpl.__init__", _impl_init)
    patch(f"{_MODULE}:FlashInferImpl.do_kv_cache_update", _do_kv_cache_update)
    patch(f"{_MODULE}:FlashInferMetadataBuilder._get_decode_wrapper", _get_decode_wrapper)
    patch(f"{_MODULE}:get_dcp_group", lambda original: lambda: QueriesAreThere() if current().helix else original())


def _counted(phase: str, combine):
    """`combine` of upstream on the real group, counted as this phase's attention and combine."""

    def counted(partial_output, partial_lse, _group, **how):
        return combined(phase, combine, partial_output, partial_lse, _real_group(), **how)

    return counted


def _builder_init(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        context = current()
        if context.helix:
            assert self.num_qo_heads % context.kvp == 0, (self.num_qo_heads, context.kvp)
            self.num_qo_heads //= context.kvp

    return __init__


def _wrapper_init(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        context = current()
        self._dcp_combine = _counted("prefill", self._dcp_combine)
        if context.helix:
            schedule_in_plain_memory(self._context)
            schedule_in_plain_memory(self._new_tokens)
            self._new_tokens = OwnedHeads(self._new_tokens, context.kvp, context.kvp_rank)

    return __init__


def _get_decode_wrapper(original):
    def get_decode_wrapper(self, batch_size, use_cudagraph=False):
        wrapper = original(self, batch_size, use_cudagraph)
        if current().helix:
            schedule_in_plain_memory(wrapper)
        return wrapper

    return get_decode_wrapper


def _impl_init(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.dcp_combine = _counted("decode", self.dcp_combine)

    return __init__


def _do_kv_cache_update(original):
    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        original(self, layer, key, value, kv_cache, slot_mapping)
        count_written(slot_mapping)

    return do_kv_cache_update
