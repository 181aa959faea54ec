"""One door to the combines: which implementation a group runs, by name, with a fall-back that says so."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist

from helix_runtime.combine.all_to_all import all_to_all_combine
from helix_runtime.combine.collectives import DIST, Collectives
from helix_runtime.combine.gather_scatter import all_gather_reduce_scatter_combine

log = logging.getLogger(__name__)

#: torch: pack, All-to-All and merge in plain torch, any device. triton: the same with our kernels, on CUDA. direct:
#: our kernels over symmetric memory, on NVLink peers. ag_rs: AllGather + ReduceScatter in torch.
Implementation = Literal["torch", "triton", "direct", "ag_rs"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


@dataclass(frozen=True)
class Chosen:
    """The combine that a group runs. `fell_back` is why it is not the one that was asked for, else None.

    combine: (partial output [B, H, D], lse [B, H], *, lse_base, return_lse) -> [B, H / N, D], with the lse if asked.
    """

    implementation: Implementation
    combine: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    fell_back: str | None = None

    @property
    def name(self) -> str:
        """For the proof of path: the implementation, and what it stands in for."""
        return self.implementation if self.fell_back is None else f"{self.implementation} (fell back: {self.fell_back})"


def choose(
    wanted: Implementation, group: dist.ProcessGroup, device: torch.device | str, collectives: Collectives = DIST
) -> Chosen:
    """The implementation `wanted` for `group`, or the next one that runs there, with a warning in the log.

    direct falls back to triton, triton to torch; every rank of the group takes the same way. Raises ValueError for an
    unknown name, listing the known ones.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"no combine is called {wanted!r}; there are: {', '.join(IMPLEMENTATIONS)}")
    device = torch.device(device)
    if wanted == "ag_rs":
        return Chosen("ag_rs", _bound(all_gather_reduce_scatter_combine, group, collectives))
    reasons = []
    if wanted == "direct":
        from helix_runtime.combine.direct import DirectUnavailable

        try:
            from helix_runtime.combine.direct import DirectCombine

            return Chosen("direct", DirectCombine(group, device))
        except DirectUnavailable as unavailable:
            reasons.append(f"direct: {unavailable}")
    if wanted in ("direct", "triton"):
        if device.type == "cuda":
            from helix_runtime.combine.packed import PackedCombine
            from helix_runtime.combine.workspace import Workspace

            return _said(
                Chosen("triton", PackedCombine(group, Workspace(device), collectives.all_to_all), _join(reasons))
            )
        reasons.append(f"triton: needs a CUDA device, not {device.type}")
    return _said(Chosen("torch", _bound(all_to_all_combine, group, collectives), _join(reasons)))


def _bound(function: Callable, group: dist.ProcessGroup, collectives: Collectives) -> Callable:
    def combine(partial_output, partial_lse, *, lse_base="e", return_lse=False):
        return function(
            partial_output, partial_lse, group, lse_base=lse_base, return_lse=return_lse, collectives=collectives
        )

    return combine


def _join(reasons: list[str]) -> str | None:
    return "; ".join(reasons) or None


def _said(chosen: Chosen) -> Chosen:
    if chosen.fell_back:
        log.warning("helix.combine runs %s", chosen.name)
    return chosen
