"""The gate: every rule is checked in the API process, before a worker starts.

Why: a wrong layout computes a plausible wrong answer; a late failure leaks GPU memory (vllm#37230).
Hook: `VllmConfig.try_verify_and_update_config`, the first place where the model and the parallel configuration meet;
`EngineArgs.create_engine_config`, before vLLM complains in its own words about DCP sizes and speculation;
`ModelConfig.verify_with_parallel_config`, whose DCP rules (TP > K, DCP <= TP // K, (Q/K) % DCP) forbid TPA < K.
Upstream: vllm `config/model.py`; no merged change allows TPA < K for GQA.
Remove when: vLLM verifies Helix layouts itself.
"""

import copy

from helix_runtime.capabilities import backends, hardware_family, plugin_refusal_on_cuda
from helix_runtime.layout import Layout, LayoutError, resolve_layout
from helix_runtime.vllm_plugin import cpu_platform, cuda_graphs, share_gpu
from helix_runtime.vllm_plugin.architectures import attention_constructor, check_mla
from helix_runtime.vllm_plugin.compat import check_version, patch, probe
from helix_runtime.vllm_plugin.cuda_combine import fault_problem
from helix_runtime.vllm_plugin.faults import make_fault
from helix_runtime.vllm_plugin.features import SPECULATION, refusal_of, refuse_unproved
from helix_runtime.vllm_plugin.options import HelixOptions, helix_options
from helix_runtime.vllm_plugin.refusal import HelixRefusal

#: Backends of vLLM on CUDA whose decode batches `helix.overlap` cuts (GQA).
OVERLAPS = ("FLASH_ATTN",)


def install() -> None:
    patch("vllm.config.vllm:VllmConfig.try_verify_and_update_config", _try_verify_and_update_config)
    patch("vllm.engine.arg_utils:EngineArgs.create_engine_config", _create_engine_config)


def _try_verify_and_update_config(original):
    def try_verify_and_update_config(self):
        original(self)
        options = helix_options(self.additional_config)
        if options is not None and self.model_config is not None:
            admit(self, options)

    return try_verify_and_update_config


def _create_engine_config(original):
    def create_engine_config(self, *args, **kwargs):
        options = helix_options(self.additional_config)
        if options is not None:
            _refuse_early(self, options)
        return original(self, *args, **kwargs)

    return create_engine_config


def _refuse_early(arguments, options: HelixOptions) -> None:
    """What vLLM would refuse by its own words before a VllmConfig exists."""
    make_fault(options.fault)
    if arguments.speculative_config is not None:
        raise refusal_of(SPECULATION)
    tp, dcp = arguments.tensor_parallel_size, arguments.decode_context_parallel_size
    if tp % dcp and arguments.prefill_context_parallel_size == 1:
        sizes = ", ".join(str(size) for size in range(1, tp + 1) if tp % size == 0)
        raise HelixRefusal(
            f"TP={tp} is not a multiple of DCP={dcp}: the KVP ranks of a sequence are consecutive TP ranks; "
            f"--decode-context-parallel-size may be {sizes} [rule tp-divisible-by-dcp, vllm: config/parallel.py]"
        )


def admit(config, options: HelixOptions) -> Layout:
    """Check versions, hooks, features and the layout of a VllmConfig, then let it through vLLM's own DCP rules.

    Raises HelixRefusal. Sets the DCP combine to `a2a` where the user left it open and asked for Helix.
    """
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    model, parallel = config.model_config, config.parallel_config
    helix_gqa = options.helix_mode and not model.use_mla
    extra = (attention_constructor(model.architecture),) if helix_gqa else ()
    probe(vllm.__version__, "cpu" if current_platform.is_cpu() else "cuda", extra)
    if model.use_mla:
        check_mla(model.architecture)
    elif parallel.dcp_q_replicate:
        raise HelixRefusal(
            f"--dcp-q-replicate makes every rank of a DCP group project the queries of all its heads, which vLLM does "
            f"for MLA models only; {model.architecture} would ignore it: drop it"
        )
    refuse_unproved(config)
    layout = layout_of(config, options)
    if options.unproved_cuda_graphs:
        cuda_graphs.admit(config, options)
    if options.share_gpu:
        share_gpu.admit(config)
    if parallel.decode_context_parallel_size > 1:
        (_admit_on_cpu if current_platform.is_cpu() else _admit_on_cuda)(config, options)
    if options.helix_mode and parallel.dcp_comm_backend is None:
        parallel.set_dcp_defaults(comm_backend="a2a")
    if helix_gqa:
        patch("vllm.config.model:ModelConfig.verify_with_parallel_config", _verify_with_parallel_config)
        model.__dict__["_helix_layout"] = layout
    return layout


def _admit_on_cpu(config, options: HelixOptions) -> None:
    """Our backends stand in for vLLM's own CPU ones; asking for another is refused, not ignored."""
    backend = config.attention_config.backend
    if backend is not None and backend.name not in ("CPU_ATTN", "CPU_MLA"):
        raise HelixRefusal(
            f"--attention-backend {backend.name} does not exist on CPU; leave it out (HELIX_CPU or HELIX_CPU_MLA run)"
        )
    if config.model_config.use_mla:
        if options.overlap > 1:
            raise HelixRefusal("overlap is wired into HELIX_CPU, not HELIX_CPU_MLA; drop it from the helix options")
        block_size = _block_size(config)
        if block_size % cpu_platform.MLA_BLOCK:
            raise HelixRefusal(
                f"--block-size {block_size}: HELIX_CPU_MLA needs a multiple of {cpu_platform.MLA_BLOCK} tokens"
            )


def _admit_on_cuda(config, options: HelixOptions) -> None:
    """What is proved on CUDA so far, or asked for as unproved. Raises HelixRefusal for the rest."""
    backend, eager = config.attention_config.backend, config.model_config.enforce_eager
    graphs = config.compilation_config.cudagraph_mode
    refusal = options.helix_mode and plugin_refusal_on_cuda(
        backend and backend.name,
        config.model_config.use_mla,
        eager,
        options.unproved_cuda_graphs,
        graphs and graphs.name,
    )
    if refusal:
        raise HelixRefusal(refusal)
    if options.helix_mode and not eager:
        cuda_graphs.on_v2(config)
        cuda_graphs.compiled(config, options)
    if options.fault and (problem := fault_problem(options.fault, captured=not eager)):
        raise HelixRefusal(problem)
    if options.capture:
        raise HelixRefusal("capture exists for the CPU backends only; drop it from the helix options")
    if options.overlap > 1 and not (options.helix_mode and backend and backend.name in OVERLAPS):
        raise HelixRefusal(
            f"overlap on CUDA is wired into --helix-mode with --attention-backend {' or '.join(OVERLAPS)} only; others "
            "make their schedule for the whole batch; drop it from the helix options"
        )


def layout_of(config, options: HelixOptions) -> Layout:
    """The layout of a VllmConfig by our own rules. Raises HelixRefusal with the rule that it breaks."""
    model, parallel = config.model_config, config.parallel_config
    backend, hardware = _on_this_gpu(config) if options.helix_mode else (None, None)
    try:
        return resolve_layout(
            parallel.tensor_parallel_size,
            parallel.decode_context_parallel_size,
            model.model_arch_config.total_num_attention_heads,
            model.get_total_num_kv_heads(),
            model.use_mla,
            options.helix_mode,
            backend,
            hardware,
            interleave_size=parallel.cp_kv_cache_interleave_size,
            block_size=_block_size(config),
            allow_gqa_tpa1=options.allow_gqa_tpa1,
        )
    except LayoutError as error:
        raise HelixRefusal(str(error)) from None


def _on_this_gpu(config) -> tuple[str | None, str | None]:
    """(backend asked for, hardware family) on CUDA, for the rule that quotes vLLM's source; (None, None) elsewhere.

    A backend that the declared table does not know is left to `_admit_on_cuda`, which says what is allowed.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None, None
    try:
        hardware = hardware_family(*current_platform.get_device_capability())
    except ValueError as error:
        raise HelixRefusal(str(error)) from None
    backend = config.attention_config.backend
    return (backend.name if backend and backend.name in backends() else None), hardware


def _block_size(config) -> int | None:
    """Tokens a block: the user's, or what vLLM's CPU platform will choose; None where only the backend decides.

    For MLA the platform would overrule the user; `cpu_platform.py` puts the user's choice back.
    """
    from vllm.platforms import current_platform

    if config.cache_config.user_specified_block_size:
        return config.cache_config.block_size
    if current_platform.is_cpu():
        return cpu_platform.MLA_BLOCK if config.model_config.use_mla else 128
    return None


def _verify_with_parallel_config(original):
    def verify_with_parallel_config(self, parallel_config):
        if "_helix_layout" not in self.__dict__:
            return original(self, parallel_config)
        # Our rules have admitted the layout; vLLM's other checks still run, on a view without context parallelism.
        without_dcp = copy.copy(parallel_config)
        without_dcp.decode_context_parallel_size = 1
        return original(self, without_dcp)

    return verify_with_parallel_config
