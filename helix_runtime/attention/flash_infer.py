"""FLASHINFER: its paged decode on tensor cores, for GQA. Its plan is made on the host, and its LSE is of base 2."""

from dataclasses import dataclass, field
from functools import cache

import torch

from helix_runtime.attention.libraries import BackendAbsent

_WORKSPACE_BYTES = 512 << 20


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass
class FlashInfer:
    """GQA. Cache [blocks, 2, block_size, Hkv, D], keys then values (its NHD layout); bf16 or fp16.

    The kernel needs a plan from the lengths on the host: `plan` makes it, and `decode` uses the last one. `partial`
    plans in every call, which waits for the device; a serving engine plans once a step from lengths it has anyway.
    """

    scale: float
    softcap: float | None = None
    name: str = "FLASHINFER"
    needs_plan = True
    settles_empty = False
    _wrapper: object = field(default=None, repr=False)

    def __post_init__(self):
        if not torch.cuda.is_available():
            raise BackendAbsent(f"{self.name} needs a CUDA device")
        try:
            import flashinfer
        except ImportError as error:
            raise BackendAbsent(f"{self.name}: {error}") from error
        self._make = flashinfer.BatchDecodeWithPagedKVCacheWrapper

    def plan(self, query, kv_cache, block_table, lengths) -> None:
        """Plan the decode of `query`'s shape over `lengths`, which are read on the host."""
        page = kv_cache.shape[2]
        host = lengths.cpu()
        # A row with no key at all keeps one page of length 1; `settle` empties it afterwards.
        host = host.clamp(min=1)
        pages = (host + page - 1) // page
        starts = torch.zeros(len(host) + 1, dtype=torch.int32)
        starts[1:] = pages.cumsum(0)
        used = torch.arange(block_table.shape[1])[None] < pages[:, None]
        indices = block_table[used.to(block_table.device)]
        if self._wrapper is None:
            self._wrapper = self._make(_workspace(query.device), "NHD", use_tensor_cores=True)
        self._wrapper.plan(
            starts,
            indices,
            ((host - 1) % page + 1).to(torch.int32),
            query.shape[1],
            kv_cache.shape[3],
            query.shape[2],
            page,
            q_data_type=query.dtype,
            kv_data_type=kv_cache.dtype,
            sm_scale=self.scale,
            logits_soft_cap=self.softcap,
        )

    def decode(self, query, kv_cache, block_table, lengths):
        """query [T, Hq, D] -> (output [T, Hq, D], the kernel's lse [T, Hq] fp32), by the last plan."""
        return self._wrapper.run(query, kv_cache, return_lse=True)
