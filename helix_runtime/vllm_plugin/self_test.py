"""The start-up self-test: known partials through the real exchange of the real group, before anything is served.

Why: a wrong rank order, LSE base or group is a plausible wrong answer later; here it is a refusal to start. So is an
exchange that never ends, because a message is not sent or is waited for in vain: it would be a server that never is
ready, which could as well be a slow host.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from helix_runtime.vllm_plugin.context_parallel import ContextParallel
from helix_runtime.vllm_plugin.refusal import HelixRefusal

#: Seconds that the exchange of a few kilobytes may take after all ranks have come, its kernels' compilation included.
DEADLINE = 120.0
_TOKENS, _HEADS_EACH, _HEAD_DIM = 3, 2, 64


def tagged_partial(kvp_rank: int, kvp: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The partial that rank `kvp_rank` contributes: fp64 output [B, H, D] and natural LSE [B, H].

    Every element differs by rank, token, head and column, so any mix-up shows. Token 1 is an empty shard on odd ranks
    whose output is garbage (NaN), and token 2 is empty everywhere.
    """
    heads = kvp * _HEADS_EACH
    token = torch.arange(_TOKENS, dtype=torch.float64)[:, None, None]
    head = torch.arange(heads, dtype=torch.float64)[None, :, None]
    column = torch.arange(_HEAD_DIM, dtype=torch.float64)[None, None, :]
    output = 1000.0 * kvp_rank + 100.0 * token + 10.0 * head + column
    lse = (0.5 * kvp_rank - 0.25 * head + 0.125 * token)[..., 0].clone()
    if kvp_rank % 2 == 1:
        output[1], lse[1] = float("nan"), float("-inf")
    output[2], lse[2] = float("nan"), float("-inf")
    return output, lse


def expected(kvp_rank: int, kvp: int) -> torch.Tensor:
    """What rank `kvp_rank` must hold after the exchange, [B, H / KVP, D] fp64, written out shard by shard."""
    total = torch.zeros(_TOKENS, kvp * _HEADS_EACH, _HEAD_DIM, dtype=torch.float64)
    weight = torch.zeros(_TOKENS, kvp * _HEADS_EACH, 1, dtype=torch.float64)
    for rank in range(kvp):
        output, lse = tagged_partial(rank, kvp)
        share = lse.exp()[..., None]
        total += torch.where(share > 0, output, 0.0) * share
        weight += share
    merged = torch.where(weight > 0, total / weight.clamp(min=1e-300), 0.0)
    return merged[:, kvp_rank * _HEADS_EACH : (kvp_rank + 1) * _HEADS_EACH]


def self_test(context: ContextParallel, device: torch.device) -> None:
    """Run it on the worker's own group; every rank calls it. Raises HelixRefusal where the merge is wrong."""
    output, lse = tagged_partial(context.kvp_rank, context.kvp)
    merged = context.combine(output.float().to(device), lse.float().to(device)).double().cpu()
    wanted = expected(context.kvp_rank, context.kvp)
    error = (merged - wanted).abs().max().item()
    if not error <= 1e-5 * wanted.abs().max().item():
        raise HelixRefusal(
            f"self-test of the {context.comm} exchange failed on rank {context.rank} (KVP rank {context.kvp_rank} of "
            f"{context.kvp}): the merge of known partials is off by {error:.3g}; refusing to serve wrong answers. "
            f"Please report this with the server's log"
        )


@contextmanager
def deadline(
    context: ContextParallel, seconds: float = DEADLINE, end: Callable[[int], None] = os._exit
) -> Iterator[None]:
    """End this worker, with the refusal in its log, where what is inside takes longer than `seconds`.

    From another thread, because this one waits in a collective, out of which no exception leads.
    """

    def hung() -> None:
        said = (
            f"self-test of the {context.comm} exchange on rank {context.rank} (KVP rank {context.kvp_rank} of "
            f"{context.kvp}) did not end in {seconds:g} s: a message of its group never came; refusing to serve. "
            f"Please report this with the server's log"
        )
        print(f"{HelixRefusal.__module__}.{HelixRefusal.__qualname__}: {said}", file=sys.stderr, flush=True)
        end(1)

    timer = threading.Timer(seconds, hung)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
