"""The collectives that the combines call, as a value: a test, a fault or a staged transport wraps one of them."""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist


class Exchange(Protocol):
    """A collective in the shape of `torch.distributed`'s single-tensor ones: fills `output` from all `input`s."""

    def __call__(self, output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> object: ...


class Collectives(NamedTuple):
    """What a combine exchanges through. Replace one with `DIST._replace(all_to_all=…)`.

    all_to_all: uint8 [N, message bytes], row i goes to, or came from, member i of the group.
    all_gather: lse [B, H] into [N, B, H], row i from member i.
    reduce_scatter: fp32 [N, B, H / N, D] summed over members into [B, H / N, D], row i for member i.
    """

    all_to_all: Exchange = dist.all_to_all_single
    all_gather: Exchange = dist.all_gather_into_tensor
    reduce_scatter: Exchange = dist.reduce_scatter_tensor


DIST = Collectives()
