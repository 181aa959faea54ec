"""Where the kernels of FlashAttention 3 and FlashMLA come from: vLLM's wheel, loaded without importing vLLM.

Both are libraries against torch's stable ABI that register their own operators, so that torch alone runs them.
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch


class BackendAbsent(RuntimeError):
    """A backend's kernels are not on this machine, or not for this GPU; says why."""


@cache
def load(name: str) -> None:
    """Load `vllm_flash_attn/_vllm_fa3_C` or `_flashmla_C` of the installed vLLM. Raises BackendAbsent."""
    spec = importlib.util.find_spec("vllm")  # finds the folder, runs nothing
    if spec is None:
        raise BackendAbsent(f"{name} ships in vLLM's CUDA wheel, and vllm is not installed")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / f"{name}.abi3.so"
        if path.exists():
            torch.ops.load_library(str(path))
            return
    raise BackendAbsent(f"the installed vllm has no {name}.abi3.so: it is not the CUDA build")


def require_hopper(name: str) -> None:
    """Raises BackendAbsent unless the current CUDA device has compute capability 9.x."""
    if not torch.cuda.is_available():
        raise BackendAbsent(f"{name} needs a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        raise BackendAbsent(f"{name} has kernels for compute capability 9.x only, this GPU is {major}.{minor}")
