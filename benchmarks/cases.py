"""The exchanges that the combine benchmark measures: their sizes, their bytes, and K sets of random inputs for each."""

import math
from dataclasses import dataclass

import torch

from helix_runtime.combine.workspace import PackedLayout

_L2_SETS_BYTES = 600e6  # ten times the H200's L2


@dataclass(frozen=True)
class Case:
    """One exchange: N ranks, B tokens, `heads` for each destination (N * heads before the exchange), D, dtype."""

    ranks: int
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    judged: bool = False

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"N{self.ranks} B{self.batch} H{self.heads} D{self.head_dim} {kind}"

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.dtype.itemsize

    @property
    def pack_bytes(self) -> int:
        """Each row and LSE read once and written once."""
        return 2 * self.ranks * self.batch * self.heads * (self.row_bytes + 4)

    @property
    def combine_bytes(self) -> int:
        """N rows and LSEs read, one row written."""
        rows = self.batch * self.heads
        return self.ranks * rows * (self.row_bytes + 4) + rows * self.row_bytes

    @property
    def sets(self) -> int:
        """Input sets: never fewer than 32, which keeps the start of a replay under 2 % of it."""
        return min(64, max(32, math.ceil(_L2_SETS_BYTES / self.pack_bytes)))

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(self.ranks, self.batch, self.heads, self.head_dim, self.dtype)


def partials(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each set what attention leaves on a rank: output [B, N * H, D] and lse [B, N * H]; no empty shard."""
    heads = case.ranks * case.heads
    return [
        (
            torch.randn(case.batch, heads, case.head_dim, dtype=case.dtype, device="cuda"),
            3 * torch.randn(case.batch, heads, device="cuda"),
        )
        for _ in range(case.sets)
    ]


def decode_mask(case: Case) -> dict[str, torch.Tensor]:
    """One token a sequence, every eighth shard empty."""
    lengths = torch.arange(case.batch, device="cuda", dtype=torch.int32) % 8
    return {
        "lengths": lengths,
        "query_start_loc": torch.arange(case.batch + 1, device="cuda", dtype=torch.int32),
    }


JUDGED = [
    Case(8, batch, heads, head_dim, judged=True)
    for heads in (16, 2)
    for batch, head_dim in ((1024, 128), (1024, 512), (64, 128), (64, 512), (8, 128), (1, 128))
]
OTHERS = [
    Case(2, 256, 16, 128),
    Case(16, 256, 4, 128),
    Case(64, 256, 2, 128),
    Case(8, 1024, 16, 96),
    Case(8, 1024, 16, 192),
    Case(8, 1024, 16, 576),
    Case(8, 1024, 16, 128, torch.float16),
    Case(8, 1024, 16, 128, torch.float32),
]
SMALL = [Case(8, 64, 16, 128), Case(8, 8, 16, 128), Case(8, 1, 16, 128), Case(8, 64, 16, 512), Case(8, 64, 2, 128)]
SWEPT = [
    Case(8, 1024, 16, 128),
    Case(8, 1024, 16, 512),
    Case(8, 1024, 2, 128),
    Case(8, 64, 16, 128),
    Case(8, 64, 2, 128),
    Case(8, 1, 2, 128),
    Case(2, 256, 16, 128),
    Case(32, 256, 2, 128),
]
