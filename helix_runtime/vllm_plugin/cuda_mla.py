"""Proof of path for MLA on CUDA. Nothing is replaced: Helix MLA is stock DCP with DCP = TP and the `a2a` combine.

Why: equal answers prove nothing if the combine never ran.
Hook: `MLADCPManager._init_combine`, whose result is wrapped by a counter; `MLAAttentionImpl.do_kv_cache_update`, where
tokens are counted if that is asked for.
Upstream: vllm `v1/attention/ops/dcp.py`, `v1/attention/backend.py`.
Remove when: vLLM reports which combine ran, and how often.
"""

from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.context_parallel import current
from helix_runtime.vllm_plugin.cuda_combine import combined, count_written


def install() -> None:
    patch("vllm.v1.attention.ops.dcp:MLADCPManager._init_combine", _init_combine)
    patch("vllm.v1.attention.backend:MLAAttentionImpl.do_kv_cache_update", _do_kv_cache_update)


def _init_combine(original):
    def init_combine(self, *args, **kwargs):
        upstream = original(self, *args, **kwargs)

        _name_direct(upstream)

        def combine(partial_output, partial_lse, **lengths):
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
