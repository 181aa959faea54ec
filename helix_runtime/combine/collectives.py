"""The collectives that the combines call, as a value: a test, a fault or a staged transport wraps one of them."""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist


class Exchange(Protocol):
    """A collective that fills `output` from the `input`s of all members of `group`."""

    def __call__(self, output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> object: ...


def all_to_all(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    dist.all_to_all_single(output, input, group=group)


# The list forms: the single-tensor ones were renamed in torch 2.13, and the old names warn on every worker.
def all_gather(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    dist.all_gather(list(output), input, group=group)


def reduce_scatter(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    dist.reduce_scatter(output, list(input), group=group)


class Collectives(NamedTuple):
    """What a combine exchanges through. Replace one with `DIST._replace(all_to_all=…)`.

    all_to_all: uint8 [N, message bytes], row i goes to, or came from, member i of the group.
    all_gather: lse [B, H] into [N, B, H], row i from member i.
    reduce_scatter: fp32 [N, B, H / N, D] summed over members into [B, H / N, D], row i for member i.
    """

    all_to_all: Exchange = all_to_all
    all_gather: Exchange = all_gather
    reduce_scatter: Exchange = reduce_scatter


DIST = Collectives()
