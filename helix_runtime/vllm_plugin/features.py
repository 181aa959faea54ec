"""Features that no cell has proved together with context parallelism of ours: each is refused by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helix_runtime.vllm_plugin.refusal import HelixRefusal

_PLAIN_KV = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Unproved:
    """A vLLM feature, the flag that turns it on, and how to see it in a VllmConfig."""

    name: str
    flag: str
    on: Callable[[Any], bool]


def _sliding_window(config: Any) -> bool:
    text = config.model_config.hf_text_config
    return config.model_config.get_sliding_window() is not None or "sliding_attention" in (
        getattr(text, "layer_types", None) or ()
    )


SPECULATION = Unproved("speculative decoding", "--speculative-config", lambda c: c.speculative_config is not None)

UNPROVED: tuple[Unproved, ...] = (
    Unproved("LoRA", "--enable-lora", lambda c: c.lora_config is not None),
    Unproved("pipeline parallelism", "--pipeline-parallel-size", lambda c: _parallel(c).pipeline_parallel_size > 1),
    Unproved("data parallelism", "--data-parallel-size", lambda c: _parallel(c).data_parallel_size > 1),
    Unproved(
        "prefill context parallelism (PCP)",
        "--prefill-context-parallel-size",
        lambda c: _parallel(c).prefill_context_parallel_size > 1,
    ),
    Unproved("expert parallelism", "--enable-expert-parallel", lambda c: _parallel(c).enable_expert_parallel),
    SPECULATION,
    Unproved("sliding-window attention", "a model without it", _sliding_window),
    Unproved("attention sinks", "a model without them", lambda c: _hf(c, "attention_sinks") or _hf(c, "sinks")),
    Unproved("dual chunk attention", "a model without it", lambda c: _hf(c, "dual_chunk_attention_config")),
    Unproved("KV connectors", "--kv-transfer-config", lambda c: c.kv_transfer_config is not None),
    Unproved("dual batch overlap (DBO)", "--enable-dbo", lambda c: _parallel(c).use_ubatching),
    Unproved("quantised weights", "--quantization", lambda c: c.model_config.quantization is not None),
    Unproved("a quantised KV cache", "--kv-cache-dtype", lambda c: c.cache_config.cache_dtype not in _PLAIN_KV),
    Unproved("multimodal input", "a text model", lambda c: c.model_config.is_multimodal_model),
    Unproved("pooling models", "--runner", lambda c: c.model_config.runner_type != "generate"),
)


def refuse_unproved(config: Any) -> None:
    """Raises HelixRefusal naming every unproved feature that a VllmConfig turns on."""
    named = [feature for feature in UNPROVED if feature.on(config)]
    if named:
        raise refusal_of(*named)


def refusal_of(*features: Unproved) -> HelixRefusal:
    named = ", ".join(f"{feature.name} ({feature.flag})" for feature in features)
    return HelixRefusal(
        f"no cell has proved Helix or our context-parallel backend together with {named}; "
        f"turn it off, or start without --helix-mode"
    )


def _hf(config: Any, name: str) -> bool:
    return bool(getattr(config.model_config.hf_text_config, name, None))


def _parallel(config: Any) -> Any:
    return config.parallel_config
