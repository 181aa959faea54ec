"""vLLM's own pack and combine kernels, to measure beside ours: from an installed vLLM, or from one file of it.

The file form is for machines without vLLM: `--vllm-ops PATH` names a copy of `vllm/v1/attention/ops/dcp.py` taken from
the release to compare with. What it imports from vLLM is stubbed while it loads; the Triton kernels need none of it.
"""

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language as tl


class VllmOps:
    """The two launches of vLLM's All-to-All combine, over its own layout: each row carries its LSE behind it."""

    def __init__(self, module: ModuleType, source: str, installed: bool = False):
        self._module = module
        self.source = source
        self.installed = installed

    def buffer(self, ranks: int, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """A send or receive buffer [N, B, H, D + 2] (D + 1 for fp32)."""
        return torch.zeros(ranks, batch, heads, head_dim + 4 // dtype.itemsize, dtype=dtype, device="cuda")

    def pack(self, output, lse, send, lengths=None, query_start_loc=None) -> None:
        ranks, _, heads, columns = send.shape
        extra = columns - output.shape[-1]
        self._module._dcp_a2a_pack_send(
            output, lse, send, ranks, heads, output.shape[-1], extra, lengths, query_start_loc
        )

    def function(self, name: str, needs_installed: bool = False):
        """A whole function or class of the file. LookupError for one that the stubs of the file form cannot carry."""
        if needs_installed and not self.installed:
            raise LookupError(f"{name} needs an installed vLLM, not the file alone")
        return getattr(self._module, name)

    def combine(self, received) -> torch.Tensor:
        """[N, B, H, D + 2] -> [B, H, D], base e, without the LSE."""
        extra = 4 // received.dtype.itemsize
        return self._module._dcp_a2a_unpack_combine(received, received.shape[-1] - extra, extra, False, True)


def load(path: Path | None) -> VllmOps | None:
    """vLLM's kernels from `path`, else from the installed vLLM, else None."""
    named = source(path)
    if named is None:
        return None
    if path is not None:
        return VllmOps(_load_file(path), named)
    return VllmOps(importlib.import_module("vllm.v1.attention.ops.dcp"), named, installed=True)


def source(path: Path | None) -> str | None:
    """What `load` would take, by name, without importing it: a file with its digest, or the release."""
    if path is not None:
        return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return f"vllm {metadata.version('vllm')}"
    except metadata.PackageNotFoundError:  # unpacked beside us, or a build of another name
        return "vllm"


class _Anything:
    """Stands for any class, decorator or function that vLLM's file imports."""

    def __init__(self, *args, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls


class _StubModule(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return {"tl": tl, "triton": triton}.get(name, _Anything)


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StubModule(spec.name)

    def exec_module(self, module):
        pass


def _load_file(path: Path) -> ModuleType:
    finder = _StubFinder()
    spec = importlib.util.spec_from_file_location("vllm_dcp_ops", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "vllm":
                del sys.modules[name]
    return module
