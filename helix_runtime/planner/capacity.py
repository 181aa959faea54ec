"""How many users fit, and where that number jumps: whole blocks of block x KVP tokens, whole users, copies of KV heads.

A rank's cache is a pool of blocks. With KVP ranks a block of the table spans block x KVP tokens of the sequence, so a
request rounds up to that many tokens and a prefix hit rounds down to them.
"""

import math
from dataclasses import dataclass

from helix_runtime.planner.hardware import Gpu

#: vLLM's default --gpu-memory-utilization (0.32).
UTILISATION = 0.92
#: What activations, graphs and workspaces take of it, bytes: assumed.
RESERVE = 4e9


@dataclass(frozen=True)
class Capacity:
    """Of one server. Bytes are of one GPU; tokens are of the whole sequence.

    `users`: requests of the asked context that fit at once. `wasted`: share of the pool that no whole user fills.
    `rounding`: share of a user's blocks that holds no token. `granularity`: tokens by which cache and prefix hits
    round. `prefix_lost`: tokens of a shared prefix that are computed again, on average over its lengths (at worst
    `granularity - 1`). `more_at`, `fewer_at`: the longest context at which one user more fits, and the shortest at
    which one fewer does; None where there is none.
    """

    pool: float
    per_user: float
    users: int
    tokens: int
    wasted: float
    rounding: float
    granularity: int
    prefix_lost: float
    more_at: int | None
    fewer_at: int | None


def capacity(gpu: Gpu, weights: float, per_token: float, context: int, kvp: int, block: int) -> Capacity:
    """`weights`: bytes that a GPU holds; `per_token`: bytes it caches for a token of its own shard."""
    pool = max(0.0, gpu.memory * UTILISATION - RESERVE - weights)
    granularity = block * kvp
    block_bytes = per_token * block
    blocks = int(pool // block_bytes)
    each = math.ceil(context / granularity)
    users = blocks // each
    return Capacity(
        pool=pool,
        per_user=each * block_bytes,
        users=users,
        tokens=blocks * granularity,
        wasted=1 - users * each / blocks if blocks else 1.0,
        rounding=1 - context / (each * granularity),
        granularity=granularity,
        prefix_lost=(granularity - 1) / 2,
        more_at=(blocks // (users + 1)) * granularity or None,
        fewer_at=(blocks // users) * granularity + 1 if users else None,
    )


def recomputed(prefix: int, granularity: int) -> int:
    """Tokens of a cached prefix that a hit does not cover, as only whole granules are kept."""
    return prefix % granularity
