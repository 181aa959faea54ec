"""One interface over the decode kernels of a GPU: `PartialAttention` by whichever kernel is named.

A decode kernel attends one query token a row over the first `lengths` keys of its shard. Everything else is settled
here: prefills and chunks become rows of their own, empty rows get output 0 and lse -inf, and the LSE becomes a natural
logarithm. Its base is measured at a kernel's first use on a device (`lse_base`), not taken from a flag: FLASHINFER's
GQA kernel returns base 2 under a flag that says e.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from helix_runtime.attention.libraries import BackendAbsent
from helix_runtime.combine.merge import LseBase
from helix_runtime.sharding import local_lengths as shard_lengths


class DecodeKernel(Protocol):
    """One backend's attention of one query token a row.

    needs_plan: `plan`, with the arguments of `decode`, must come first, and reads the lengths on the host.
    settles_empty: a row of length 0 is returned as output 0 and lse -inf whatever the batch; true of our own kernels.
    """

    name: str
    scale: float
    needs_plan: bool
    settles_empty: bool

    def decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [T, Hq, D], block_table int32 [T, max_blocks], lengths int32 [T] -> (output [T, Hq, Dv], lse [T, Hq]),
        the lse fp32 in the kernel's own base, empty rows as the kernel leaves them."""
        ...


@dataclass(frozen=True)
class DeviceAttention:
    """`PartialAttention` by one decode kernel, for one place in the KVP group (see `helix_runtime.sharding`)."""

    kernel: DecodeKernel
    kvp: int = 1
    kvp_rank: int = 0
    interleave: int = 1

    def partial(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        local_lengths: torch.Tensor,
        *,
        query_start_loc: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        causal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PartialAttention.partial`. Without `query_start_loc` each row is one request's newest token, so that
        the local lengths are the whole mask, and nothing is computed but the attention.

        With it, every token is a row of its own with its own length: right for any batch, and meant for a few tokens a
        request; a long prefill reads the context once for each token. No host synchronisation, unless the kernel
        plans (`FLASHINFER`).
        """
        if query_start_loc is not None:
            block_table, local_lengths = self._rows(
                query.shape[0], block_table, local_lengths, query_start_loc, seq_lens, causal
            )
        base = lse_base(self.kernel, query, kv_cache)
        if self.kernel.needs_plan:
            self.kernel.plan(query, kv_cache, block_table, local_lengths)
        output, lse = self.kernel.decode(query, kv_cache, block_table, local_lengths)
        return settle(self.kernel, base, output, lse, local_lengths)

    def _rows(self, tokens, block_table, lengths, query_start_loc, seq_lens, causal):
        """(block table [T, max_blocks], lengths [T]) of every token as a row of its own; 0 for padding."""
        token = torch.arange(tokens, device=query_start_loc.device)
        request = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True)
        padding = request >= len(seq_lens)
        request = request.clamp(max=len(seq_lens) - 1)
        visible = lengths[request]
        if causal:
            position = seq_lens[request] - query_start_loc[1:][request] + token
            seen = shard_lengths(position + 1, self.kvp, self.kvp_rank, self.interleave)
            visible = torch.minimum(visible, seen.to(visible.dtype))
        return block_table[request], visible.masked_fill(padding, 0).to(torch.int32)


def settle(
    kernel: DecodeKernel, base: LseBase, output: torch.Tensor, lse: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel's own (output [T, Hq, Dv], lse [T, Hq]) -> output 0 and lse -inf on empty rows, lse natural."""
    if base == "2":
        lse = lse * math.log(2.0)
    if not kernel.settles_empty:
        empty = lengths == 0
        output = output.masked_fill(empty[:, None, None], 0.0)
        lse = lse.masked_fill(empty[:, None], float("-inf"))
    return output, lse


_BASES: dict[tuple, LseBase] = {}


def lse_base(kernel: DecodeKernel, query: torch.Tensor, kv_cache: torch.Tensor) -> LseBase:
    """The base of the LSE that `kernel` returns for such queries and caches, measured once a process.

    Measured on a cache of one block whose first two keys score 1 for every head: the natural LSE is 1 + ln 2 = 1.693,
    that of base 2 is log2(e) + 1 = 2.443. Synchronises with the host, so it must have run before a CUDA graph is
    captured (RuntimeError). Raises BackendAbsent for an LSE that is neither.
    """
    key = (kernel.name, kernel.scale, query.device, query.dtype, query.shape[1:], kv_cache.shape[1:])
    if key not in _BASES:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{kernel.name} must have run once before it is captured in a CUDA graph")
        _BASES[key] = _measure(kernel, query, kv_cache)
    return _BASES[key]


def _measure(kernel: DecodeKernel, query: torch.Tensor, kv_cache: torch.Tensor) -> LseBase:
    cache = kv_cache.new_zeros((2, *kv_cache.shape[1:]))
    cache[..., 0] = 1.0 / kernel.scale
    probe = query.new_zeros((1, *query.shape[1:]))
    probe[..., 0] = 1.0
    table = torch.zeros(1, 1, dtype=torch.int32, device=query.device)
    lengths = torch.tensor([2], dtype=torch.int32, device=query.device)
    if kernel.needs_plan:
        kernel.plan(probe, cache, table, lengths)
    _, lse = kernel.decode(probe, cache, table, lengths)
    for base, value in (("e", 1.0 + math.log(2.0)), ("2", math.log2(math.e) + 1.0)):
        if bool(((lse[0] - value).abs() < 0.05).all()):
            return base
    found = lse[0].float().mean().item()
    raise BackendAbsent(f"{kernel.name} returned an LSE of {found} where base e gives 1.693 and base 2 gives 2.443")


def _kernels() -> dict[str, Callable[..., DecodeKernel]]:
    from helix_runtime.attention.flash_attention3 import FlashAttention3, FlashAttention3MLA
    from helix_runtime.attention.flash_infer import FlashInfer
    from helix_runtime.attention.flash_mla import FlashMLA
    from helix_runtime.attention.triton_decode import TritonDecode, TritonDecodeMLA

    return {
        "FLASH_ATTN": FlashAttention3,
        "FLASHINFER": FlashInfer,
        "TRITON": TritonDecode,
        "FLASH_ATTN_MLA": FlashAttention3MLA,
        "FLASHMLA": FlashMLA,
        "TRITON_MLA": TritonDecodeMLA,
    }


#: Names of the decode kernels for GQA and for MLA, vLLM's own where vLLM has one.
GQA_KERNELS = ("FLASH_ATTN", "FLASHINFER", "TRITON")
MLA_KERNELS = ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA")


def decode_kernel(name: str, scale: float, **options) -> DecodeKernel:
    """The decode kernel `name`. Raises BackendAbsent where it cannot run here, ValueError for an unknown name."""
    known = (*GQA_KERNELS, *MLA_KERNELS)
    if name not in known:
        raise ValueError(f"no decode kernel is called {name!r}; there are: {', '.join(known)}")
    return _kernels()[name](scale, **options)
