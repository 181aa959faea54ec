"""What vLLM's CPU platform forces on MLA models, and HELIX_CPU_MLA does not need.

Why: stock CPU MLA decodes by a kernel for blocks of 16 tokens and has no prefill over cached context, so the platform
sets the block size to 16 and switches prefix caching and chunked prefill off. `cpu_mla.py` reads any block size that is
a multiple of 16 and has such a prefill.
Hook: `CpuPlatform.check_and_update_config`: what the user asked for is put back after it ran. A pass-through, because
the engine's process, which verifies nothing anew, runs it again.
Upstream: vllm `platforms/cpu.py`.
Remove when: vLLM's CPU MLA has no such limits.
"""

from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.options import helix_options

#: What `HELIX_CPU_MLA` reads; vLLM's CPU latent cache is laid out in multiples of it.
MLA_BLOCK = 16


def install() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        patch("vllm.platforms.cpu:CpuPlatform.check_and_update_config", _check_and_update_config)


def ours(config) -> bool:
    """Whether HELIX_CPU_MLA will serve a VllmConfig on CPU."""
    model, parallel = config.model_config, config.parallel_config
    asked = model is not None and helix_options(config.additional_config) is not None
    return asked and model.use_mla and parallel.decode_context_parallel_size > 1


def _check_and_update_config(original):
    def check_and_update_config(cls, vllm_config):
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        if not ours(vllm_config):
            return original(cls, vllm_config)
        block_size = cache.block_size if cache.user_specified_block_size else None
        prefix_caching = cache.enable_prefix_caching
        chunks, tokens = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        original(cls, vllm_config)
        cache.block_size = block_size or cache.block_size
        cache.enable_prefix_caching = prefix_caching
        scheduler.enable_chunked_prefill = chunks
        if chunks:
            scheduler.max_num_batched_tokens = tokens

    return check_and_update_config
