"""Helix inside vLLM's CUDA graphs: `additional_config={"helix": {"unproved_cuda_graphs": true}}`. For validation.

Why: no cell has proved it, so the gate asks for `--enforce-eager`; cells that shall prove it must be able to start.
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
    if not config.use_v2_model_runner:
        raise HelixRefusal(
            f"{OPTION}: the proof of path counts the tokens of captured batches in vLLM's V2 model runner only; "
            f"unset VLLM_USE_V2_MODEL_RUNNER, or drop what makes vLLM take V1"
        )
