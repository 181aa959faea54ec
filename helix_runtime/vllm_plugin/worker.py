"""Where a worker process turns into a Helix worker.

Why: workers receive a finished VllmConfig by pickling, so nothing of `gate.py` runs there; they patch themselves.
Hook: `WorkerBase.__init__`, the first call that knows the configuration; `Worker.load_model`, after the process
groups exist and around the building of the model.
Upstream: none needed.
Remove when: a general plugin is handed the configuration.
"""

import importlib.util

from helix_runtime.proof import ProofWriter, RankProof
from helix_runtime.vllm_plugin import share_gpu
from helix_runtime.vllm_plugin.compat import patch
from helix_runtime.vllm_plugin.options import HelixOptions, helix_options


def install() -> None:
    patch("vllm.v1.worker.worker_base:WorkerBase.__init__", _init)


def _init(original):
    def __init__(self, vllm_config, local_rank, rank, *args, **kwargs):
        original(self, vllm_config, local_rank, rank, *args, **kwargs)
        options = helix_options(vllm_config.additional_config)
        if options is not None and options.share_gpu:
            share_gpu.install()
        if options is not None and vllm_config.parallel_config.decode_context_parallel_size > 1:
            activate(vllm_config, options, rank)

    return __init__


def activate(config, options: HelixOptions, rank: int) -> None:
    """Patch this process for one rank: its backend, and for Helix the TPA scope and owned heads."""
    from vllm.platforms import current_platform

    from helix_runtime.vllm_plugin import owned_heads, tpa_scope
    from helix_runtime.vllm_plugin.architectures import attention_constructor
    from helix_runtime.vllm_plugin.gate import layout_of

    layout = layout_of(config, options)
    if current_platform.is_cpu():
        from helix_runtime.vllm_plugin import cpu_attention, cpu_collectives, cpu_mla, slot_mapping

        cpu_collectives.install()
        cpu_attention.install()
        cpu_mla.install()
        slot_mapping.install()
    else:
        from helix_runtime.vllm_plugin import exchange

        backend = config.attention_config.backend
        mode = None if config.model_config.enforce_eager else config.compilation_config.cudagraph_mode
        options = exchange.meant_on_cuda(
            options,
            layout.use_mla,
            backend and backend.name,
            config.parallel_config.dcp_comm_backend,
            mode and mode.name,
        )
        _install_on_cuda(layout.use_mla, backend)
        exchange.install_on_cuda(options.combine)
        if options.proof_dir:
            from helix_runtime.vllm_plugin import device_proof

            device_proof.install()
    if options.helix_mode and not layout.use_mla:
        view = tpa_scope.TPAView(world_size=layout.tpa, rank_in_group=layout.tpa_rank(rank))
        tpa_scope.install(attention_constructor(config.model_config.architecture), view)
        owned_heads.install(layout.kvp)
    patch("vllm.v1.worker.gpu_worker:Worker.load_model", lambda original: _load_model(original, options, layout))


def _install_on_cuda(use_mla: bool, backend) -> None:
    """The hooks of the backend that was named; where vLLM chooses, of each that it may choose."""
    name = backend.name if backend is not None else None
    if use_mla:
        from helix_runtime.vllm_plugin import cuda_mla

        cuda_mla.install()
        return
    if name != "FLASHINFER":
        from helix_runtime.vllm_plugin import flash_attention

        flash_attention.install()
    if name == "FLASHINFER" or (name is None and importlib.util.find_spec("flashinfer")):
        from helix_runtime.vllm_plugin import flashinfer_attention

        flashinfer_attention.install()


def _load_model(original, options: HelixOptions, layout):
    def load_model(self, *args, **kwargs):
        from vllm.distributed.parallel_state import get_dcp_group
        from vllm.platforms import current_platform

        from helix_runtime.vllm_plugin.capture import Capture, group_gather
        from helix_runtime.vllm_plugin.context_parallel import ContextParallel, set_current
        from helix_runtime.vllm_plugin.exchange import combine_of
        from helix_runtime.vllm_plugin.faults import make_fault
        from helix_runtime.vllm_plugin.self_test import deadline, self_test

        parallel, cpu = self.vllm_config.parallel_config, current_platform.is_cpu()
        make_combine, combine_name = combine_of(parallel.dcp_comm_backend, cpu, options.combine)
        context = ContextParallel(
            layout=layout,
            rank=self.rank,
            comm=parallel.dcp_comm_backend,
            interleave=parallel.cp_kv_cache_interleave_size,
            proof=ProofWriter(options.proof_dir, self.rank),
            make_combine=make_combine,
            combine_name=combine_name,
            counts_tokens=cpu,
            micro_batches=options.overlap,
        )
        set_current(context)
        original(self, *args, **kwargs)
        get_dcp_group().barrier()  # ranks load at different speeds; from here on they should take the same time
        with deadline(context):
            self_test(context, self.device)
        if options.proof_dir and not cpu:
            from helix_runtime.vllm_plugin.device_proof import runs_v2

            context.proof.count_on(self.device)
            context.counts_tokens = not runs_v2(self.model_runner)
        context.armed = make_fault(options.fault)
        context.armed.fault.weights(self.model_runner.model, self.rank)
        if options.capture and options.proof_dir:
            context.capture = Capture(options.proof_dir, self.rank, group_gather(), self.vllm_config.model_config.dtype)
        context.proof.identify(rank_proof(self, context))

    return load_model


def rank_proof(worker, context) -> RankProof:
    """Who this worker is, read from the objects that will run, not from what was asked for."""
    import vllm
    from vllm.config import get_layers_from_vllm_config
    from vllm.distributed.parallel_state import get_dcp_group, get_tp_group
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(worker.vllm_config, AttentionLayerBase)
    impls = {type(layer.impl) for layer in layers.values()}
    latent = [layer for layer in layers.values() if isinstance(layer, MLAAttention)]
    layout, group = context.layout, get_dcp_group()
    return RankProof(
        rank=get_tp_group().rank_in_group,
        tp=get_tp_group().world_size,
        kvp=group.world_size,
        tpa=layout.tpa,
        kvp_rank=group.rank_in_group,
        tpa_rank=layout.tpa_rank(context.rank),
        helix=context.helix,
        backend=", ".join(sorted({_backend_name(layer) for layer in layers.values()})),
        impl=", ".join(sorted(f"{impl.__module__}.{impl.__qualname__}" for impl in impls)),
        combine=context.comm,
        combine_impl=context.combine_name,
        group_size=group.world_size,
        group_ranks=tuple(group.ranks),
        interleave=context.interleave,
        lse_base="e" if all(_natural(impl) for impl in impls) else "2",
        model_runner=f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__qualname__}",
        vllm_version=vllm.__version__,
        self_test="ok",
        on_device=context.proof.on_device is not None,
        micro_batches=context.micro_batches,
        q_replicated=bool(latent) and all(layer.dcp_q_replicate for layer in latent),
    )


def _natural(impl: type) -> bool:
    """Whether an implementation's LSE is natural. FLASHINFER inherits a flag that says yes; its kernels use base 2."""
    return impl.lse_base_on_e and impl.__qualname__ != "FlashInferImpl"


def _backend_name(layer) -> str:
    """vLLM's name of a layer's backend, or ours where vLLM's closed list has no name for it."""
    from helix_runtime.vllm_plugin.context_parallel import BACKEND_NAMES

    return BACKEND_NAMES.get(type(layer.impl).__qualname__, layer.attn_backend.get_name())
