"""Architectures that Helix may change, each with the attention class whose construction enters the TPA scope.

An allow-list, because a model may do anything with the tensor parallel group inside attention: OLMo 2 gathers its QK
norm over TP, which silently breaks when attention is sharded TPA ways.
"""

from helix_runtime.vllm_plugin.compat import Surface
from helix_runtime.vllm_plugin.refusal import HelixRefusal

_MODELS = "vllm.model_executor.models"
_LLAMA = (
    "self", "config", "hidden_size", "num_heads", "num_kv_heads", "max_position_embeddings", "quant_config", "bias",
    "bias_o_proj", "cache_config", "prefix", "attn_type",
)  # fmt: skip
_QWEN2 = (
    "self", "hidden_size", "num_heads", "num_kv_heads", "rope_parameters", "max_position", "cache_config",
    "quant_config", "prefix", "attn_type", "dual_chunk_attention_config", "qk_norm", "rms_norm_eps",
)  # fmt: skip
_QWEN3 = (
    "self", "hidden_size", "num_heads", "num_kv_heads", "rope_parameters", "max_position", "head_dim",
    "rms_norm_eps", "qkv_bias", "cache_config", "quant_config", "prefix", "attn_type",
    "dual_chunk_attention_config", "per_layer_sliding_window", "mrope_positions_factor",
)  # fmt: skip
_QWEN3_MOE = (
    "self", "hidden_size", "num_heads", "num_kv_heads", "rope_parameters", "max_position_embeddings", "head_dim",
    "rms_norm_eps", "qkv_bias", "cache_config", "quant_config", "prefix", "dual_chunk_attention_config",
    "mrope_positions_factor",
)  # fmt: skip

#: GQA architecture -> the constructor of its attention. Llama's class also serves Nemotron's Llama family.
GQA: dict[str, Surface] = {
    "LlamaForCausalLM": Surface(f"{_MODELS}.llama:LlamaAttention.__init__", _LLAMA, "TPA scope"),
    "MistralForCausalLM": Surface(f"{_MODELS}.mistral:MistralAttention.__init__", _LLAMA, "TPA scope"),
    "Qwen2ForCausalLM": Surface(f"{_MODELS}.qwen2:Qwen2Attention.__init__", _QWEN2, "TPA scope"),
    "Qwen3ForCausalLM": Surface(f"{_MODELS}.qwen3:Qwen3Attention.__init__", _QWEN3, "TPA scope"),
    "Qwen3MoeForCausalLM": Surface(f"{_MODELS}.qwen3_moe:Qwen3MoeAttention.__init__", _QWEN3_MOE, "TPA scope"),
}


#: MLA architectures. Nothing in them is rebuilt: with TPA = 1 every rank projects Q/TP heads, as in stock DCP = TP.
MLA: tuple[str, ...] = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


def check_mla(architecture: str) -> None:
    """Raises HelixRefusal for an MLA architecture that is not on the list."""
    if architecture not in MLA:
        raise _not_listed(architecture, MLA)


def attention_constructor(architecture: str) -> Surface:
    """The constructor to wrap for a GQA architecture. Raises HelixRefusal for one that is not on the list."""
    if architecture not in GQA:
        raise _not_listed(architecture, GQA)
    return GQA[architecture]


def _not_listed(architecture: str, allowed) -> HelixRefusal:
    return HelixRefusal(
        f"architecture {architecture} is not on Helix's list: no cell has shown that its attention keeps to its own "
        f"heads and shards; allowed: {', '.join(sorted(allowed))}. Start without --helix-mode"
    )
