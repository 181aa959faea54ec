"""Proof of path for MLA on CUDA, and an fp32 LSE where TRITON_MLA has rounded it to the model's dtype.

Why: equal answers prove nothing if the combine never ran. Helix MLA is stock DCP with DCP = TP and the `a2a` combine;
but TRITON_MLA lets its kernel write the LSE, which it has in fp32, into a buffer of the query's dtype: in bf16 an LSE
of 10 is off by up to 0.03, and so are the shards' weights, several times what rounding does elsewhere.
Hook: `MLADCPManager._init_combine`, whose result is wrapped by a counter; `MLAAttentionImpl.do_kv_cache_update`, where
tokens are counted in the V1 runner. With Helix, `TritonMLAImpl.forward_mqa` and the kernel's launcher in its module:
the kernel gets an fp32 buffer, and the combine that buffer.
FLASH_ATTN_MLA's LSE is a transposed view, which vLLM's direct exchange between GPUs refuses; with Helix it is copied.
Upstream: vllm `v1/attention/ops/dcp.py`, `v1/attention/backend.py`, `v1/attention/backends/mla/triton_mla.py`.
Remove when: vLLM reports which combine ran, and how often, and TRITON_MLA's LSE is fp32.
"""

import torch

from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.cuda_combine import combined, count_written

_TRITON_MLA = "vllm.v1.attention.backends.mla.triton_mla"


def install() -> None:
    patch("vllm.v1.attention.ops.dcp:MLADCPManager._init_combine", _init_combine)
    patch("vllm.v1.attention.backend:MLAAttentionImpl.do_kv_cache_update", _do_kv_cache_update)
    precise: list[torch.Tensor] = []  # the LSE of the decode that runs
    patch(f"{_TRITON_MLA}:decode_attention_fwd", lambda original: _into_fp32(original, precise))
    patch(f"{_TRITON_MLA}:TritonMLAImpl.forward_mqa", lambda original: _with_that_lse(original, precise))


def _init_combine(original):
    def init_combine(self, *args, **kwargs):
        upstream = original(self, *args, **kwargs)

        _name_direct(upstream)

        def combine(partial_output, partial_lse, **lengths):
            # By strides: torch calls the view of one token contiguous.
            if current().helix and partial_lse.stride() != (partial_lse.shape[1], 1):
                partial_lse = partial_lse.clone(memory_format=torch.contiguous_format)
            return combined("decode", upstream, partial_output, partial_lse, **lengths)

        return combine

    return init_combine


def _name_direct(upstream) -> None:
    """Between GPUs of one host vLLM exchanges through symmetric memory, not by what `--dcp-comm-backend` names."""
    function = getattr(upstream, "func", upstream)
    if function.__name__ == "_direct_workspace_combine":
        context = current()
        context.combine_name = f"{function.__module__}.{function.__qualname__}"
        context.proof.amend(combine_impl=context.combine_name)


def _do_kv_cache_update(original):
    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        original(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
        count_written(slot_mapping)

    return do_kv_cache_update


def _into_fp32(original, precise: list[torch.Tensor]):
    def decode_attention_fwd(q, k_buffer, v_buffer, o, lse, *args, **kwargs):
        if current().helix:
            lse = torch.zeros_like(lse, dtype=torch.float32)
            precise[:] = [lse]
        original(q, k_buffer, v_buffer, o, lse, *args, **kwargs)

    return decode_attention_fwd


def _with_that_lse(original, precise: list[torch.Tensor]):
    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        output, lse = original(self, q, kv_c_and_k_pe_cache, attn_metadata, layer)
        return output, precise.pop() if precise else lse

    return forward_mqa
