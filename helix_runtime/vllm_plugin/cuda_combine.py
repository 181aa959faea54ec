"""The combine of a CUDA backend: counted for the proof of path, and with a deliberate defect around it if one is armed.

On CUDA the backends' own combines run, so a fault can change what is sent (`partial`), the base of the LSE that the
merge is told (`lse-base-2`), and what comes out (`merged`); the rest of `faults.py` lives in our CPU backends.
"""

from collections.abc import Callable

import torch

from helix_runtime.vllm_plugin.context_parallel import ContextParallel, current
from helix_runtime.vllm_plugin.faults import FAULTS, NO_FAULT, NOTHING_ARMED, Fault, Site

#: All points at which a fault can enter, and those of them that are reached here.
_POINTS = tuple(name for name, point in vars(Fault).items() if callable(point) and not name.startswith("_"))
_HERE = {"partial", "merged"}
_RESTRICTIONS = ("batch", "single", "decode", "prefill", "rank", "call", "head")
#: … where CUDA graphs are captured: Python chooses once, at capture, and so nothing that changes from step to step.
_RESTRICTIONS_CAPTURED = ("rank", "head")


def combined(phase: str, combine: Callable, output: torch.Tensor, lse: torch.Tensor, *args, **how):
    """`combine(output, lse, …)` of this rank's partial, output [T, H, D] and lse [T, H], counted as `phase`."""
    context = current()
    context.proof.ran(phase, captured=capturing())
    fault, site = _struck(context, phase, lse)
    if fault is NO_FAULT:
        return combine(output, lse, *args, **how)
    output, lse = fault.partial(output, lse, site)
    if fault.lse_base != "e":
        how["is_lse_base_on_e"] = not getattr(combine, "keywords", {}).get("is_lse_base_on_e", True)
    merged = combine(output.contiguous(), lse.contiguous(), *args, **how)
    if isinstance(merged, tuple):
        return fault.merged(merged[0], site).contiguous(), *merged[1:]
    return fault.merged(merged, site).contiguous()


def capturing() -> bool:
    """Whether a CUDA graph is being captured; False on a host without a GPU (tests)."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def count_written(slot_mapping: torch.Tensor) -> None:
    """Count a layer's tokens where they are written, in the V1 runner; `device_proof.py` counts those of V2.

    slot_mapping: [T], -1 for what another rank owns.
    """
    context = current()
    if context.counts_tokens:
        context.proof.count("local_tokens", (slot_mapping >= 0).sum())
        context.proof.count("global_tokens", slot_mapping.numel())


def _struck(context: ContextParallel, phase: str, lse: torch.Tensor) -> tuple[Fault, Site | None]:
    if context.armed is NOTHING_ARMED:
        return NO_FAULT, None
    site = Site(
        layer=-1, kvp_rank=context.kvp_rank, requests=lse.shape[0], decode=phase == "decode",
        reads_context=phase == "prefill", first_head=context.layout.query_heads_computed(context.rank).start,
    )  # fmt: skip
    return context.armed.at(site), site


def fault_problem(spec: str, captured: bool = False) -> str | None:
    """Why the fault `spec` cannot strike on CUDA, with what can, or None. The spec itself is known to be right.

    `captured`: the server captures CUDA graphs.
    """
    name, _, restrictions = spec.partition(":")
    possible = sorted(known for known, kind in FAULTS.items() if _strikes_here(kind))
    if name not in possible:
        return f"fault {name} lives in the CPU backends; on CUDA: {', '.join(possible)}"
    allowed, where = (_RESTRICTIONS_CAPTURED, "in CUDA graphs") if captured else (_RESTRICTIONS, "on CUDA")
    for when in restrictions.split(",") if restrictions else ():
        if when.partition("=")[0] not in allowed:
            return f"fault {name} cannot be restricted to {when} {where}; allowed: {', '.join(allowed)}"
    return None


def _strikes_here(kind: type[Fault]) -> bool:
    changed = {point for point in _POINTS if getattr(kind, point) is not getattr(Fault, point)}
    return changed <= _HERE and bool(changed or kind.lse_base != Fault.lse_base)
