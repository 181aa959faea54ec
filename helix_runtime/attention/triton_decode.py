"""TRITON and TRITON_MLA: our split-KV kernels behind the interface that all decode kernels share."""

from dataclasses import dataclass

import torch

from helix_runtime.attention.completion import wait_for
from helix_runtime.attention.split_kv import MLA_LAUNCH, Launch, decode_gqa, decode_mla, gqa_runs, join


@dataclass(frozen=True)
class TritonDecode:
    """GQA. Cache [blocks, 2, block_size, Hkv, D], keys then values, any strides but the last."""

    scale: float
    splits: int | None = None
    launch: Launch | None = None
    name: str = "TRITON"
    needs_plan = False
    settles_empty = True

    def decode(self, query, kv_cache, block_table, lengths):
        """query [T, Hq, D], lengths int32 [T] -> (output [T, Hq, D], natural lse [T, Hq] fp32)."""
        keys, values = kv_cache.unbind(1)
        options = {"splits": self.splits, "launch": self.launch}
        return decode_gqa(query, keys, values, block_table, lengths, self.scale, **options)

    def sends(self, heads: int, kv_heads: int, ranks: int) -> bool:
        """Always: the join writes where it is told."""
        return True

    def send(self, query, kv_cache, block_table, lengths, outputs, lses) -> None:
        """Attention straight into a send buffer: outputs [N, T, Hq / N, D] and lses [N, T, Hq / N]."""
        keys, values = kv_cache.unbind(1)
        options = {"splits": self.splits, "launch": self.launch, "out": outputs, "lse": lses}
        decode_gqa(query, keys, values, block_table, lengths, self.scale, **options)

    def begin(self, query, kv_cache, block_table, lengths, done=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The first of the two kernels: what `finish` joins, perhaps on another stream (HOP-B). With `done`
        (`completion.counters` [T]) rows [T] of it may be joined before the rest is attended: see `arrived`."""
        keys, values = kv_cache.unbind(1)
        options = {"splits": self.splits, "launch": self.launch, "done": done}
        return gqa_runs(query, keys, values, block_table, lengths, self.scale, **options)

    def finish(self, parts: tuple[torch.Tensor, torch.Tensor], outputs: torch.Tensor, lses: torch.Tensor) -> None:
        """The second: into a send buffer, as `send`."""
        join(*parts, outputs.dtype, outputs, lses)

    def arrived(self, parts, rows: slice, done: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of `rows`, for `finish`, once they are there: what follows on the current stream waits."""
        part, part_lse = parts
        wait_for(done[rows], part.shape[1] * kv_heads)
        return part[rows], part_lse[rows]


@dataclass(frozen=True)
class TritonDecodeMLA:
    """MLA. Cache of latents [blocks, block_size, 512 + 64]."""

    scale: float
    value_dim: int = 512
    splits: int | None = None
    launch: Launch = MLA_LAUNCH
    name: str = "TRITON_MLA"
    needs_plan = False
    settles_empty = True

    def decode(self, query, kv_cache, block_table, lengths):
        """query [T, H, 576], lengths int32 [T] -> (output [T, H, 512], natural lse [T, H] fp32)."""
        return decode_mla(query, kv_cache, block_table, lengths, self.scale, **self._options)

    def sends(self, heads: int, kv_heads: int, ranks: int) -> bool:
        return True

    def send(self, query, kv_cache, block_table, lengths, outputs: torch.Tensor, lses: torch.Tensor) -> None:
        """See `TritonDecode.send`."""
        decode_mla(query, kv_cache, block_table, lengths, self.scale, out=outputs, lse=lses, **self._options)

    @property
    def _options(self) -> dict:
        return {"value_dim": self.value_dim, "splits": self.splits, "launch": self.launch}
