"""An attention layer that takes Q/TPA query heads and hands Q/TP heads to `o_proj`.

Why: after the All-to-All a rank owns 1/KVP of the heads that it computed, and `o_proj` is sharded TP ways.
Hook: `Attention.__init__`; a layer built inside a TPA scope becomes a `HelixAttention`, whose `forward` allocates the
smaller output. The backend's `forward` fills it.
Upstream: vllm `model_executor/layers/attention/attention.py`, where output heads always equal query heads.
Remove when: `Attention` takes the number of output heads.
"""

import torch
from vllm.model_executor.layers.attention import attention as upstream

from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.tpa_scope import in_tpa_scope


class HelixAttention(upstream.Attention):
    """vLLM's attention layer with `owned_heads` = num_heads / KVP output heads."""

    owned_heads: int

    def forward(self, query, key, value, output_shape=None, output_dtype=None):
        """query [T, num_heads * D], key and value [T, num_kv_heads * D] -> [T, owned_heads * Dv]."""
        assert output_shape is None, "Helix decides the output shape"
        tokens = query.shape[0]
        query = query.view(tokens, self.num_heads, self.head_size)
        key = key.view(tokens, self.num_kv_heads, self.head_size)
        value = value.view(tokens, self.num_kv_heads, self.head_size_v)
        output = query.new_empty(tokens, self.owned_heads, self.head_size_v, dtype=output_dtype or query.dtype)
        if self.use_direct_call:
            written = upstream.unified_kv_cache_update(key, value, self.layer_name)
            upstream.unified_attention_with_output(
                query, key, value, output, self.layer_name, kv_cache_dummy_dep=written
            )
        else:
            name = upstream._encode_layer_name(self.layer_name)
            written = torch.ops.vllm.unified_kv_cache_update(key, value, name)
            torch.ops.vllm.unified_attention_with_output(query, key, value, output, name, kv_cache_dummy_dep=written)
        return output.view(tokens, self.owned_heads * self.head_size_v)


def install(kvp: int) -> None:
    """Patch this worker process: attention layers built in a TPA scope own 1/`kvp` of their heads."""

    def make(original):
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            if in_tpa_scope():
                assert self.num_heads % kvp == 0, (self.num_heads, kvp)
                self.__class__ = HelixAttention
                self.owned_heads = self.num_heads // kvp

        return __init__

    patch("vllm.model_executor.layers.attention.attention:Attention.__init__", make)
