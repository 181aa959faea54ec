"""Random batches of requests, and their paged, interleaved shards, for tests of attention and combine."""

from dataclasses import dataclass

import torch

from helix_runtime.attention import dense_attention_fp64, split_cpu_kv_cache
from helix_runtime.sharding import slot_mapping


@dataclass(frozen=True)
class Batch:
    """Requests with `new` query tokens each at the end of `lengths`; keys and values dense, a tensor a request."""

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    query: torch.Tensor  # [T, Hq, D]
    keys: tuple[torch.Tensor, ...]  # [S, Hkv, D]
    values: tuple[torch.Tensor, ...]  # [S, Hkv, D]
    scale: float

    @classmethod
    def random(cls, seed, lengths, new, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        keys = tuple(normal(length, kv_heads, dim) for length in lengths)
        values = tuple(normal(length, kv_heads, dim) for length in lengths)
        return cls(tuple(lengths), tuple(new), 2 * normal(sum(new), heads, dim), keys, values, dim**-0.5)

    @property
    def query_start_loc(self):
        return torch.tensor([0, *self.new]).cumsum(0).to(torch.int32)

    @property
    def seq_lens(self):
        return torch.tensor(self.lengths, dtype=torch.int32)

    def dense(self, **options):
        """fp64 (output [T, Hq, D], lse [T, Hq]) of ordinary attention, request by request."""
        parts = [
            dense_attention_fp64(query, key, value, scale=self.scale, **options)
            for query, key, value in zip(self.query.split(self.new), self.keys, self.values, strict=True)
        ]
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(lses)

    def block_table(self, kvp, block_size):
        """Blocks in a shuffled order, the same for every rank, as the scheduler hands them out."""
        needed = [-(-length // (block_size * kvp)) for length in self.lengths]
        ids = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(7)).to(torch.int32)
        table = torch.full((len(needed), max(needed) + 1), int(ids[-1]), dtype=torch.int32)
        for row, count in enumerate(needed):
            table[row, :count] = ids[sum(needed[:row]) :][:count]
        return table

    def kv_cache(self, kvp, kvp_rank, interleave, block_size):
        """This rank's cache in vLLM's CPU layout; NaN wherever no token was written."""
        table = self.block_table(kvp, block_size)
        _, kv_heads, dim = self.keys[0].shape
        blocks = int(table.max()) + 1
        cache = torch.full((blocks, kv_heads, block_size, 2 * dim), float("nan"), dtype=self.query.dtype)
        key_cache, value_cache = split_cpu_kv_cache(cache)
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        slots = slot_mapping(
            positions, table, ends, block_size=block_size, kvp=kvp, kvp_rank=kvp_rank, interleave=interleave
        )
        mine = slots >= 0
        block, offset = slots[mine] // block_size, slots[mine] % block_size
        key_cache[block, :, offset] = torch.cat(self.keys)[mine]
        value_cache[block, :, offset] = torch.cat(self.values)[mine]
        return cache
