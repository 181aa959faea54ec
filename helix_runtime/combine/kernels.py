"""Triton kernels for the two ends of the exchange: pack before the All-to-All, combine after it.

Both move each byte once; nothing is tuned at run time, nothing synchronises with the host, and every launch can be
captured in a CUDA graph (once it has run, and so compiled, outside of one).

The merge means what `merge.merge_partials` means. It adds the ranks one after the other, 0 to N-1, in fp32, so that a
row's bits depend on its own partials and on nothing else: not on the batch around it, not on the launch's sizes, not
on which rank computes it.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from helix_runtime.combine.device_code import combine_kernel, pack_kernel
from helix_runtime.combine.merge import LseBase

#: What the kernels move, and the integers of the same width that pack moves it as.
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Launch:
    """Size of one program: `access` bytes of each rank's rows per thread, `warps` warps of 32 threads.

    pdl: start while the kernel before it on the stream still runs (see `device_code`). barrier: keep the wide loads of
    a combine before those of its LSEs.
    """

    access: int
    warps: int
    pdl: bool = False
    barrier: bool = True

    @property
    def options(self) -> dict:
        """For Triton. The option is left out where it is off: the interpreter does not know it."""
        return {"num_warps": self.warps, "PDL": self.pdl} | ({"launch_pdl": True} if self.pdl else {})

    def block(self, width: int, itemsize: int) -> int:
        """Segments of `width` elements that one program handles."""
        return max(1, self.access * self.warps * 32 // itemsize // width)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a device has programmatic dependent launch: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def pack_launch(device: torch.device) -> Launch:
    """The launch of a pack, measured on an H200 (benchmarks/results/combine-sweep-h200.json and
    combine-small-h200.json): within 4 % of the best at every size there."""
    return Launch(access=32, warps=4, pdl=overlaps(device))


def combine_launch(ranks: int, merged_bytes: int, device: torch.device) -> Launch:
    """The launch of a combine that writes `merged_bytes`, from the same measurements.

    A combine wants many threads with little each: 8 bytes of every rank; 4 where it writes too little to fill the GPU
    with threads of 8, and 4 for many ranks, whose partials would not fit the registers otherwise. With more than 8
    ranks it is not started early: its programs then fill the registers that the kernel before still needs.
    """
    early = ranks <= 8 and overlaps(device)
    return Launch(access=4 if ranks > 32 or merged_bytes <= 64 << 10 else 8, warps=4, pdl=early)


#: The most partials a combine holds in registers.
MAX_RANKS = 64


def pack(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    outputs: torch.Tensor,
    lses: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    peers: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """Sort one rank's partials by destination, and empty the rows of empty shards, in one launch.

    partial_output: [B, N * H, D] bf16, fp16 or fp32, any strides; partial_lse: [B, N * H] fp32, any strides. `outputs`
    [N, B, H, D] and `lses` [N, B, H], views of a send buffer (`PackedLayout`), are written: chunk n gets the heads
    [n * H, (n + 1) * H).

    A row whose lse is -inf is written as output 0, lse -inf, whatever its output held. So are the rows that the mask
    calls empty: `lengths` [B] alone gives each token's local KV length, with 0 for an empty shard or a padding row;
    with `query_start_loc` [S + 1], `lengths` [S] are those of sequences, sequence s owns the tokens
    [query_start_loc[s], query_start_loc[s + 1]), and tokens past the last one are padding. Both int32, on the device.

    `peers` int64 [N]: addresses to write the chunks to, one for each rank, in the layout of `outputs` and `lses`, which
    then only describe it and are not written (`direct.DirectCombine`).

    Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    ranks, batch, heads, head_dim = outputs.shape
    rows = batch * heads
    _check_exchange(outputs, lses)
    if partial_output.shape != (batch, ranks * heads, head_dim) or partial_output.dtype != outputs.dtype:
        found = f"{partial_output.dtype} {tuple(partial_output.shape)}"
        raise ValueError(f"cannot pack {found} into outputs {outputs.dtype} {tuple(outputs.shape)}")
    if partial_lse.shape != (batch, ranks * heads) or partial_lse.dtype != torch.float32:
        raise ValueError(f"partial_lse is {partial_lse.dtype} {tuple(partial_lse.shape)}, not fp32 [B, N * H]")
    sequences = _check_mask(lengths, query_start_loc, batch)
    if rows == 0:
        return
    width = _width(head_dim)
    launch = launch or pack_launch(outputs.device)
    block = launch.block(width, outputs.itemsize)
    bits = _BITS[outputs.dtype]
    pack_kernel[(triton.cdiv(rows * (head_dim // width), block), ranks)](
        partial_output.view(bits),
        partial_lse,
        outputs.view(bits),
        lses,
        lengths,
        query_start_loc,
        peers,
        rows,
        sequences,
        sequences.bit_length(),
        *partial_output.stride(),
        *partial_lse.stride(),
        outputs.stride(0),
        lses.stride(0),
        lses.data_ptr() - outputs.data_ptr(),
        HEADS=heads,
        SEGMENTS=head_dim // width,
        WIDTH=width,
        BLOCK=block,
        DIRECT=peers is not None,
        MASK=0 if lengths is None else 1 if query_start_loc is None else 2,
        **launch.options,
    )


def combine(
    outputs: torch.Tensor,
    lses: torch.Tensor,
    base: LseBase = "e",
    *,
    return_lse: bool = True,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge the partials that N ranks sent, in one launch: `merge.merge_partials` for the GPU.

    outputs: [N, B, H, D] bf16, fp16 or fp32; lses: [N, B, H] fp32, logarithms of `base`, -inf for an empty partial,
    whose output is not read into the sum; both contiguous within each rank (`PackedLayout` views, or whole tensors).
    Returns (output [B, H, D] in the dtype of outputs, natural-log lse [B, H] fp32, or None without `return_lse`).
    Where all partials are empty the output is 0 and the lse -inf. `out` [B, H, D], contiguous, is written if given.

    Raises ValueError for shapes, strides, dtypes or bases that do not fit.
    """
    if base not in ("e", "2"):
        raise ValueError(f'lse base {base!r} is neither "e" nor "2"')
    ranks, batch, heads, head_dim = outputs.shape
    rows = batch * heads
    _check_exchange(outputs, lses)
    if ranks > MAX_RANKS:
        raise ValueError(f"{ranks} partials in one combine; at most {MAX_RANKS}")
    if out is None:
        out = outputs.new_empty((batch, heads, head_dim))
    if out.shape != outputs.shape[1:] or out.dtype != outputs.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not contiguous {outputs.dtype} [B, H, D]")
    lse = lses.new_empty((batch, heads)) if return_lse else None
    if rows == 0:
        return out, lse
    width = _width(head_dim)
    launch = launch or combine_launch(ranks, out.numel() * out.itemsize, out.device)
    block = launch.block(width, outputs.itemsize)
    combine_kernel[(triton.cdiv(rows * (head_dim // width), block),)](
        outputs,
        lses,
        out,
        lse,
        rows,
        outputs.stride(0),
        lses.stride(0),
        RANKS=ranks,
        SEGMENTS=head_dim // width,
        WIDTH=width,
        BLOCK=block,
        BASE_E=base == "e",
        WRITE_LSE=return_lse,
        BARRIER=launch.barrier,
        **launch.options,
    )
    return out, lse


def _width(head_dim: int) -> int:
    """Elements in a segment: the largest power of two that divides the head size, at most 128."""
    return math.gcd(head_dim, 128)


def _check_exchange(outputs: torch.Tensor, lses: torch.Tensor) -> None:
    if outputs.dtype not in _BITS or lses.dtype != torch.float32:
        raise ValueError(f"outputs are {outputs.dtype} and lses {lses.dtype}, not bf16, fp16 or fp32, and fp32")
    if outputs.shape[:-1] != lses.shape or not len(lses):
        raise ValueError(f"outputs {tuple(outputs.shape)} and lses {tuple(lses.shape)} are not [N, B, H, D], [N, B, H]")
    if not (outputs[0].is_contiguous() and lses[0].is_contiguous()):
        raise ValueError("outputs and lses must be contiguous within each rank")


def _check_mask(lengths: torch.Tensor | None, query_start_loc: torch.Tensor | None, batch: int) -> int:
    """How many sequences a mask describes; 0 without sequences."""
    if query_start_loc is not None and lengths is None:
        raise ValueError("query_start_loc without lengths: both are needed to tell an empty shard")
    if lengths is None:
        return 0
    if query_start_loc is None:
        if lengths.shape != (batch,):
            raise ValueError(f"lengths {tuple(lengths.shape)} do not give one local length to each of {batch} tokens")
        return 0
    if query_start_loc.shape != (len(lengths) + 1,):
        raise ValueError(f"query_start_loc {tuple(query_start_loc.shape)} does not bound {len(lengths)} sequences")
    return len(lengths)
