"""Helix in CUDA graphs that no cell has proved: `additional_config={"helix": {"unproved_cuda_graphs": true}}`.

Why: the gate lets in what cells have judged (`capabilities.IN_CUDA_GRAPHS`) and asks for `--enforce-eager` otherwise;
cells that shall prove the rest must be able to start.
What a capture keeps: the branch that Python took, the addresses of buffers (`Workspace` and `DirectCombine` never free
what a graph has seen), and the additions of the proof. What it does not: Python counters, so the proof counts on the
device (`device_proof.py`); a fault's restriction to some calls or batches, so these are refused (`cuda_combine.py`).
Remove when: cells have proved every mode, and the gate lets it in.
"""

from helix_runtime.vllm_plugin.options import HelixOptions
from helix_runtime.vllm_plugin.refusal import HelixRefusal

OPTION = "unproved_cuda_graphs"


def admit(config, options: HelixOptions) -> None:
    """Raises HelixRefusal where a VllmConfig has no graphs to prove, or none that can be proved."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise HelixRefusal(f"{OPTION} needs a CUDA device: there are no CUDA graphs on this one; drop it")
    if options.share_gpu:
        raise HelixRefusal(
            f"{OPTION} and share_gpu: collectives of ranks that share a GPU go through host memory, which CUDA graphs "
            f"cannot capture; drop one of them"
        )
    if config.model_config.enforce_eager:
        raise HelixRefusal(f"{OPTION} with --enforce-eager: there are no CUDA graphs to try; drop one of them")
    on_v2(config)


def compiled(config, options: HelixOptions) -> None:
    """Raises HelixRefusal for graphs of a model that vLLM does not compile: it turns the modes that were judged into
    others then, after this check."""
    compilation, graphs = config.compilation_config.mode, config.compilation_config.cudagraph_mode
    none = graphs is not None and graphs.name == "NONE"
    if compilation is None or compilation.name == "VLLM_COMPILE" or none or options.unproved_cuda_graphs:
        return
    raise HelixRefusal(
        f"no cell has proved Helix in CUDA graphs with compilation mode {compilation.name}; allowed: VLLM_COMPILE, "
        f"vLLM's default. Drop --compilation-config.mode (or -O0), or add --enforce-eager"
    )


def on_v2(config) -> None:
    """Raises HelixRefusal for CUDA graphs in vLLM's V1 model runner: no cell ran there, and no proof could count."""
    if not config.use_v2_model_runner:
        raise HelixRefusal(
            "Helix in CUDA graphs was proved in vLLM's V2 model runner only, where the tokens of captured batches can "
            "be counted; unset VLLM_USE_V2_MODEL_RUNNER, drop what makes vLLM take V1, or add --enforce-eager"
        )
