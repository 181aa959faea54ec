"""Localisation: `additional_config={"helix": {"capture": true}}` checks every merged attention against fp64.

Each rank gathers the keys and values that the shards of its group really hold, computes dense attention in fp64 for the
heads it owns, and compares. So a wrong answer is traced to the first layer, head and rank where merging went wrong; an
error outside attention shows nothing here. Slow: for one more run of a cell that failed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from helix_runtime.attention.paged import PagedShard
from helix_runtime.proof import Deviation
from helix_runtime.sharding import global_positions, local_lengths
from helix_runtime.vllm_plugin.faults import Site

#: Relative error that a right merge stays far below; `tests/vllm_plugin/test_capture.py` measures it in fp32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Capture:
    """One rank's comparison. `first` is its first deviation; the file `capture.rankN.json` holds it and the calls.

    gather_objects: any value of this rank -> the values of all ranks of its KVP group, in order. Collective.
    """

    def __init__(self, folder: str | Path, rank: int, gather_objects: Callable[[object], list], dtype: torch.dtype):
        self.path = Path(folder) / f"capture.rank{rank}.json"
        self.rank = rank
        self.gather_objects = gather_objects
        self.tolerance = TOLERANCE[dtype]
        self.calls = 0
        self.first: Deviation | None = None

    def check(self, context, site: Site, query, key_cache, value_cache, block_table, query_start_loc, seq_lens, scale,
              merged, expand=None) -> None:  # fmt: skip
        """Compare merged [T, owned, Dv] with fp64 attention of query [T, H, D] over all shards. Collective.

        `expand`: whole keys and values of the shards -> those of the owned heads; `query` then holds these heads only.
        """
        parts = self._gather(context, key_cache, value_cache, block_table, seq_lens)
        owned = merged.shape[1]
        mine = slice(context.kvp_rank * owned, (context.kvp_rank + 1) * owned)
        starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
        worst: Deviation | None = None
        for request, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
            if start == end:
                continue
            keys, values = _whole(parts, request, length)
            if expand:
                right = _dense(query[start:end], *expand(keys, values), length, scale)
            else:
                right = _dense(query[start:end], keys, values, length, scale)[:, mine]
            error = (merged[start:end].double() - right).abs() / right.abs().max().clamp(min=1e-30)
            error = torch.nan_to_num(error, nan=float("inf")).amax(dim=2)
            at = int(error.argmax())
            token, head = divmod(at, owned)
            if error[token, head] > self.tolerance and (worst is None or error[token, head] > worst.error):
                worst = Deviation(
                    call=self.calls, layer=site.layer, head=site.first_head + mine.start + head, rank=self.rank,
                    kvp_rank=context.kvp_rank, request=request, position=length - (end - start) + token,
                    requests=site.requests, decode=site.decode, error=float(error[token, head]),
                )  # fmt: skip
        self.calls += 1
        if worst is not None and self.first is None:
            self.first = worst
        if self.first is worst or self.calls % 16 == 0:
            self._write()

    def _write(self) -> None:
        record = {"rank": self.rank, "calls": self.calls, "tolerance": self.tolerance,
                  "first": asdict(self.first) if self.first else None}  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record))

    def _gather(self, context, key_cache, value_cache, block_table, seq_lens) -> list[list[tuple]]:
        """Of each member, of each request: (positions, keys [Hkv, n, D], values [Hkv, n, Dv]) in its shard."""
        counts = local_lengths(seq_lens, context.kvp, context.kvp_rank, context.interleave).tolist()
        shard = PagedShard(key_cache, value_cache, block_table, torch.float64)
        held = []
        for request, count in enumerate(counts):
            positions = global_positions(
                count, kvp=context.kvp, kvp_rank=context.kvp_rank, interleave=context.interleave
            )
            held.append((positions, *shard.gather(request, count)) if count else None)
        return self.gather_objects(held)


def group_gather() -> Callable[[object], list]:
    """`gather_objects` over the worker's real KVP group."""
    from vllm.distributed.parallel_state import get_dcp_group

    group = get_dcp_group()

    def gather(value: object) -> list:
        parts: list = [None] * group.world_size
        dist.all_gather_object(parts, value, group=group.cpu_group)
        return parts

    return gather


def _whole(parts, request: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [Hkv, length, D] and values [Hkv, length, Dv] of one request, put together from all shards, fp64."""
    held = [part[request] for part in parts if part[request] is not None]
    order = torch.cat([positions for positions, _, _ in held]).argsort()
    assert order.numel() == length, f"the shards hold {order.numel()} of {length} tokens"
    keys, values = (torch.cat([part[index] for part in held], dim=1)[:, order].double() for index in (1, 2))
    return keys, values


def _dense(query, keys, values, length: int, scale: float) -> torch.Tensor:
    """Causal attention of the last T positions, [T, H, D] -> [T, H, Dv], fp64."""
    tokens, heads, _ = query.shape
    group = heads // keys.shape[0]
    scores = torch.einsum("thd,hnd->htn", query.double(), keys.repeat_interleave(group, dim=0)) * scale
    position = torch.arange(length - tokens, length)
    scores.masked_fill_(torch.arange(length)[None, None] > position[None, :, None], float("-inf"))
    return torch.einsum("htn,hnd->thd", scores.softmax(dim=-1), values.repeat_interleave(group, dim=0))
