"""The coupling surface: the vLLM objects that the plugin hooks, with the parameters they must have.

Why: a plugin over unstable internals must fail loudly, in the API process, before any worker starts, and never patch
something that changed its meaning. `probe` runs before any patch but those of the pass-through doors (`__init__.py`).
Remove when: a hook's own `Remove when` has come true; its rows here go with it.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helix_runtime.capabilities import SUPPORTED_VLLM
from helix_runtime.vllm_plugin.refusal import HelixRefusal


@dataclass(frozen=True)
class Surface:
    """One vLLM callable: `module:qualified.name`, its parameter names, and what we use it for."""

    target: str
    parameters: tuple[str, ...]
    use: str
    platform: str = "any"  # any, cpu, cuda


_ATTENTION = "vllm.model_executor.layers.attention.attention"

SURFACE: tuple[Surface, ...] = (
    Surface("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",), "flag"),
    Surface("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",), "flag"),
    Surface(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        ("self", "usage_context", "headless"),
        "gate",
    ),
    Surface("vllm.config.vllm:VllmConfig.try_verify_and_update_config", ("self",), "gate"),
    Surface("vllm.config.model:ModelConfig.verify_with_parallel_config", ("self", "parallel_config"), "gate"),
    Surface("vllm.config.parallel:ParallelConfig.set_dcp_defaults", ("self", "comm_backend", "q_replicate"), "gate"),
    Surface(
        "vllm.v1.worker.worker_base:WorkerBase.__init__",
        ("self", "vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker"),
        "worker",
    ),
    Surface("vllm.v1.worker.gpu_worker:Worker.load_model", ("self", "load_dummy_weights"), "worker"),
    Surface("vllm.distributed.parallel_state:get_tp_group", (), "TPA scope"),
    Surface("vllm.distributed.parallel_state:get_dcp_group", (), "exchange"),
    Surface("vllm.distributed.parallel_state:get_tensor_model_parallel_world_size", (), "TPA scope"),
    Surface("vllm.distributed.parallel_state:get_tensor_model_parallel_rank", (), "TPA scope"),
    Surface(
        "vllm.model_executor.layers.linear:RowParallelLinear.__init__",
        (
            "self", "input_size", "output_size", "bias", "input_is_parallel", "skip_bias_add", "params_dtype",
            "reduce_results", "quant_config", "prefix", "return_bias", "disable_tp",
        ),
        "TPA scope",
    ),
    Surface(
        f"{_ATTENTION}:Attention.__init__",
        (
            "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "use_alibi_sqrt",
            "cache_config", "quant_config", "logits_soft_cap", "per_layer_sliding_window", "prefix", "attn_type",
            "kv_sharing_target_layer_name", "mm_prefix_clamp_sliding_window", "attn_backend", "head_size_v",
            "extra_impl_args",
        ),
        "owned heads",
    ),
    Surface(
        f"{_ATTENTION}:Attention.forward",
        ("self", "query", "key", "value", "output_shape", "output_dtype"),
        "owned heads",
    ),
    Surface(f"{_ATTENTION}:unified_kv_cache_update", ("key", "value", "layer_name"), "owned heads"),
    Surface(
        f"{_ATTENTION}:unified_attention_with_output",
        (
            "query", "key", "value", "output", "layer_name", "output_scale", "output_block_scale",
            "kv_cache_dummy_dep",
        ),
        "owned heads",
    ),
    Surface(
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        ("selected_backend", "attn_selector_config", "num_heads"),
        "CPU backend",
        platform="cpu",
    ),
    Surface(
        "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator._all_group_ranks_share_shm_group_name",
        ("self",),
        "CPU collectives",
        platform="cpu",
    ),
    Surface(
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        ("vllm_config",),
        "CPU MLA",
        platform="cpu",
    ),
    Surface(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.__init__",
        (
            "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window",
            "kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks",
        ),
        "CPU backend",
        platform="cpu",
    ),
    Surface(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "CPU backend",
        platform="cpu",
    ),
    Surface(
        "vllm.v1.attention.ops.dcp:MLADCPManager._init_combine",
        ("self", "num_heads", "head_dim", "dtype", "is_lse_base_on_e", "use_pcp"),
        "MLA combine",
    ),
    Surface(
        "vllm.v1.attention.backends.mla.triton_mla:TritonMLAImpl.forward_mqa",
        ("self", "q", "kv_c_and_k_pe_cache", "attn_metadata", "layer"),
        "MLA",
        platform="cuda",
    ),
    Surface(
        "vllm.v1.attention.backends.mla.triton_mla:decode_attention_fwd",
        (
            "q", "k_buffer", "v_buffer", "o", "lse", "req_to_token", "b_seq_len", "attn_logits", "num_kv_splits",
            "sm_scale", "page_size", "logit_cap", "k_scale", "v_scale", "is_mla",
        ),
        "MLA",
        platform="cuda",
    ),
    Surface(
        "vllm.v1.attention.backend:MLAAttentionImpl.do_kv_cache_update",
        ("self", "kv_c_normed", "k_pe", "kv_cache", "slot_mapping", "kv_cache_dtype", "k_scale"),
        "MLA",
    ),
    Surface(
        "vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl.forward_mqa",
        ("self", "q", "kv_c_and_k_pe_cache", "attn_metadata", "layer"),
        "CPU MLA",
        platform="cpu",
    ),
    Surface(
        "vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl.forward_mha",
        (
            "self", "q", "kv_c_normed", "k_pe", "kv_c_and_k_pe_cache", "attn_metadata", "k_scale", "output",
            "output_scale",
        ),
        "CPU MLA",
        platform="cpu",
    ),
    Surface(
        "vllm._custom_ops:cp_gather_cache",
        ("src_cache", "dst", "block_table", "cu_seq_lens", "batch_size", "seq_starts"),
        "CPU MLA",
        platform="cpu",
    ),
    Surface(
        "vllm._custom_ops:gather_mla_context_cache_cpu",
        ("src_cache", "dst", "block_table", "starts", "cu_seq_lens"),
        "CPU MLA",
        platform="cpu",
    ),
    Surface(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl._forward_with_dcp",
        (
            "self", "query", "key", "value", "key_cache", "value_cache", "output", "attn_metadata", "q_descale",
            "k_descale", "v_descale",
        ),
        "FLASH_ATTN",
        platform="cuda",
    ),
    Surface(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "FLASH_ATTN",
        platform="cuda",
    ),
    Surface(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "FLASH_ATTN",
        platform="cuda",
    ),
    Surface(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        "FLASH_ATTN",
        platform="cuda",
    ),
    Surface("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", ("self",), "proof", platform="cuda"),
    Surface(
        "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
        ("self", "idx_mapping", "query_start_loc", "positions", "num_tokens_padded", "out"),
        "proof",
        platform="cuda",
    ),
    Surface(
        "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
        ("self", "num_reqs", "query_start_loc", "positions"),
        "CPU slot mapping",
        platform="cpu",
    ),
)  # fmt: skip

_FLASHINFER = "vllm.v1.attention.backends.flashinfer"
_A2A = (
    "cp_attn_out", "cp_attn_lse", "cp_group", "ctx", "return_lse", "is_lse_base_on_e", "seq_lens", "query_start_loc",
)  # fmt: skip

#: Hooked only where a backend or a combine is chosen. `probe` leaves them alone, since importing them takes libraries
#: that a server without them does not have; `python -m harness surface` compares them like the others.
LATER: tuple[Surface, ...] = (
    Surface(
        f"{_FLASHINFER}:FlashInferMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        "FLASHINFER",
        platform="cuda",
    ),
    Surface(
        f"{_FLASHINFER}:FlashInferMetadataBuilder._get_decode_wrapper",
        ("self", "batch_size", "use_cudagraph"),
        "FLASHINFER",
        platform="cuda",
    ),
    Surface(
        f"{_FLASHINFER}:BatchDCPPrefillWrapper.__init__",
        ("self", "kv_layout", "workspace_buffer", "dcp_a2a"),
        "FLASHINFER",
        platform="cuda",
    ),
    Surface(
        f"{_FLASHINFER}:FlashInferImpl.__init__",
        (
            "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window",
            "kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks",
        ),
        "FLASHINFER",
        platform="cuda",
    ),
    Surface(
        f"{_FLASHINFER}:FlashInferImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "FLASHINFER",
        platform="cuda",
    ),
    Surface(f"{_FLASHINFER}:get_dcp_group", (), "FLASHINFER", platform="cuda"),
    Surface("vllm.v1.attention.ops.dcp:dcp_a2a_lse_reduce", _A2A, "exchange", platform="cuda"),
    Surface("vllm.v1.attention.backends.flash_attn:dcp_a2a_lse_reduce", _A2A, "exchange", platform="cuda"),
    Surface(f"{_FLASHINFER}:dcp_a2a_lse_reduce", _A2A, "exchange", platform="cuda"),
)  # fmt: skip


def resolve(target: str) -> tuple[Any, str, Callable]:
    """(holder, attribute, object) of `module:qualified.name`. Raises ImportError or AttributeError."""
    module_name, qualified = target.split(":")
    holder: Any = importlib.import_module(module_name)
    *path, attribute = qualified.split(".")
    for part in path:
        holder = getattr(holder, part)
    return holder, attribute, getattr(holder, attribute)


def check_version(version: str) -> None:
    """Raises HelixRefusal for a vLLM that no cell has run on."""
    if version.split("+")[0] not in SUPPORTED_VLLM:
        raise HelixRefusal(
            f"vLLM {version} is not supported by this plugin; supported: {', '.join(SUPPORTED_VLLM)}. "
            f"Install one of these, or start without --helix-mode"
        )


def probe(version: str, platform: str, extra: tuple[Surface, ...] = ()) -> None:
    """Compare every row of the surface with the vLLM at hand. Raises HelixRefusal naming the first that changed.

    Args:
        version: `vllm.__version__`, for the message.
        platform: `cpu` or `cuda`; rows of the other platform are left alone.
        extra: further rows, such as the attention class of the model's architecture.
    """
    for row in (*SURFACE, *extra):
        if row.platform not in ("any", platform):
            continue
        try:
            found = _parameters(resolve(row.target)[2])
        except (ImportError, AttributeError) as problem:
            raise _changed(row, version, f"it is gone ({problem})") from None
        if found != row.parameters:
            raise _changed(row, version, f"it takes {found}, expected {row.parameters}")


def patch(target: str, make: Callable[[Callable], Callable]) -> None:
    """Replace `target` by `make(original)`; an object that is patched already is left alone.

    A classmethod's `original` takes the class as its first argument, like the replacement. Raises AttributeError where
    the object is gone or, listed in SURFACE, takes other parameters.
    """
    holder, attribute, _ = resolve(target)
    descriptor = inspect.getattr_static(holder, attribute)
    kind = type(descriptor) if isinstance(descriptor, (classmethod, staticmethod)) else None
    original = descriptor.__func__ if kind else descriptor
    if _is_patched(original):
        return
    wanted = next((row.parameters for row in SURFACE if row.target == target), None)
    if wanted is not None and _parameters(original) != wanted:
        raise AttributeError(f"{target} takes {_parameters(original)}, expected {wanted}")
    replacement = functools.wraps(original)(make(original))
    replacement.__helix_original__ = original
    setattr(holder, attribute, kind(replacement) if kind else replacement)


def _is_patched(function: Callable) -> bool:
    return "__helix_original__" in getattr(function, "__dict__", {})


def _parameters(function: Callable) -> tuple[str, ...]:
    """Parameter names of vLLM's own object, seen through our replacement, without `cls`."""
    names = tuple(inspect.signature(function).parameters)
    return names[1:] if names[:1] == ("cls",) else names


def _changed(row: Surface, version: str, what: str) -> HelixRefusal:
    return HelixRefusal(
        f"vLLM {version} changed {row.target}, which Helix hooks for: {row.use}; {what}. "
        f"Supported: vLLM {', '.join(SUPPORTED_VLLM)}. Install one of these, or start without --helix-mode"
    )
