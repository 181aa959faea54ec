"""The bytes of one exchange: how a send buffer is laid out, and where it lives.

A send buffer holds one *chunk* per destination rank, so that a single ``all_to_all_single`` over equal splits moves
output and LSE together. Inside a chunk come first the output rows, then their LSEs:

    chunk n:  | outputs [batch, heads, head_dim] in the model's dtype | lses [batch, heads] in fp32 | padding |

Keeping the LSEs apart from the rows (rather than behind each row) leaves every row on its natural alignment, so that
both kernels read and write 16 bytes at a time, and leaves the LSE an exact fp32.
"""

from dataclasses import dataclass

import torch

# Chunks start on a cache line: 128 bytes. Also makes every stride a multiple of 16 elements, which is what Triton
# must know of a stride before it emits 16-byte accesses.
_LINE = 128


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class PackedLayout:
    """Byte layout of one exchange among ``ranks`` ranks.

    ``batch`` is the number of query rows (tokens), ``heads`` the heads each destination owns after the exchange
    (the heads before it are ``ranks * heads``), ``head_dim`` the size of one output row in elements.
    """

    ranks: int
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, partial_output: torch.Tensor, ranks: int) -> "PackedLayout":
        """The layout for ``partial_output`` [B, H, D]. Raises ValueError where H does not divide by ``ranks``."""
        batch, total_heads, head_dim = partial_output.shape
        if total_heads % ranks:
            raise ValueError(f"{total_heads} heads do not divide among {ranks} ranks")
        return cls(ranks, batch, total_heads // ranks, head_dim, partial_output.dtype)

    @property
    def rows(self) -> int:
        """Output rows (token, head) in one chunk."""
        return self.batch * self.heads

    @property
    def lse_offset(self) -> int:
        """Bytes from a chunk's start to its LSEs."""
        return _round_up(self.rows * self.head_dim * self.dtype.itemsize, _LINE)

    @property
    def chunk_bytes(self) -> int:
        """Bytes that travel to each destination."""
        return self.lse_offset + _round_up(self.rows * 4, _LINE)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole send (or receive) buffer."""
        return self.ranks * self.chunk_bytes

    def outputs(self, buffer: torch.Tensor) -> torch.Tensor:
        """The outputs [ranks, batch, heads, head_dim] in ``buffer``, a flat uint8 tensor: a view, nothing is copied."""
        typed = self._flat(buffer).view(self.dtype)
        stride = self.chunk_bytes // self.dtype.itemsize
        shape = (self.ranks, self.batch, self.heads, self.head_dim)
        return typed.as_strided(shape, (stride, self.heads * self.head_dim, self.head_dim, 1), typed.storage_offset())

    def lses(self, buffer: torch.Tensor) -> torch.Tensor:
        """The fp32 LSEs [ranks, batch, heads] in ``buffer``, a flat uint8 tensor: a view, nothing is copied."""
        typed = self._flat(buffer).view(torch.float32)
        offset = typed.storage_offset() + self.lse_offset // 4
        return typed.as_strided((self.ranks, self.batch, self.heads), (self.chunk_bytes // 4, self.heads, 1), offset)

    def _flat(self, buffer: torch.Tensor) -> torch.Tensor:
        if buffer.dtype != torch.uint8 or buffer.ndim != 1 or buffer.numel() < self.nbytes:
            raise ValueError(
                f"an exchange of {self} needs a flat uint8 buffer of {self.nbytes} bytes, "
                f"got {buffer.dtype} {tuple(buffer.shape)}"
            )
        return buffer[: self.nbytes]


class Workspace:
    """Static buffers on one device, by name, that grow and never move under a captured CUDA graph.

    A graph bakes in the addresses it saw at capture. When a larger exchange outgrows a buffer that was handed out
    during a capture, the old memory is therefore kept for as long as the workspace lives, and only later callers get
    the new one. A buffer no capture has seen is given back to the allocator.

    Two exchanges that are in flight at once (micro-batches, streams) must use different names.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._current: dict[str, torch.Tensor] = {}
        self._captured: dict[int, torch.Tensor] = {}

    def buffer(self, name: str, nbytes: int) -> torch.Tensor:
        """The first ``nbytes`` bytes of buffer ``name`` as a flat uint8 tensor with undefined contents."""
        held = self._current.get(name)
        if held is None or held.numel() < nbytes:
            # Doubling bounds the number of retired buffers, and their total, by the size of the largest one.
            size = max(_round_up(nbytes, _LINE), 2 * held.numel() if held is not None else 0)
            held = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._current[name] = held
        if self._capturing():
            self._captured[held.data_ptr()] = held
        return held[:nbytes]

    def pinned_bytes(self) -> int:
        """Bytes kept only because a captured graph may still use them."""
        live = {held.data_ptr() for held in self._current.values()}
        return sum(held.numel() for address, held in self._captured.items() if address not in live)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
