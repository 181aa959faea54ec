"""The decode attentions that are measured: their sizes, their bytes, and paged caches of random keys."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """B requests of S local tokens each, Q query heads over K KV heads; `latent` is MLA, 512 values + 64 RoPE."""

    batch: int
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    latent: bool = False

    @property
    def name(self) -> str:
        kind = "MLA" if self.latent else f"K{self.kv_heads} D{self.head_dim}"
        tokens = f"{self.tokens >> 20}M" if self.tokens >= 1 << 20 else f"{self.tokens >> 10}k"
        return f"B{self.batch} S{tokens} Q{self.q_heads} {kind}"

    @property
    def width(self) -> int:
        return 576 if self.latent else self.head_dim

    @property
    def token_bytes(self) -> int:
        """Of one cached token, bf16."""
        return 576 * 2 if self.latent else 2 * self.kv_heads * self.head_dim * 2

    @property
    def bytes(self) -> int:
        """The keys and values, read once: the rest is below a thousandth of them."""
        return self.batch * self.tokens * self.token_bytes

    @property
    def flops(self) -> int:
        wide = (576 + 512) if self.latent else 2 * self.head_dim
        return 2 * self.batch * self.tokens * self.q_heads * wide

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def sets(self) -> int:
        """Input sets, so that a replay reads at least ten times the 60 MB L2."""
        return max(1, -(-600_000_000 // self.bytes))


JUDGED = [
    Attention(8, 128 << 10, 8, 1),
    Attention(1, 1 << 20, 8, 1),
    Attention(64, 16 << 10, 8, 1),
    Attention(8, 128 << 10, 128, 1, latent=True),
    Attention(8, 16 << 10, 128, 1, latent=True),
]
OTHERS = [
    Attention(8, 128 << 10, 16, 1),
    Attention(64, 16 << 10, 16, 1, head_dim=64),
    Attention(8, 64 << 10, 16, 2),
    Attention(1, 128 << 10, 8, 1),
    Attention(8, 16 << 10, 8, 1),
    Attention(8, 128 << 10, 16, 1, latent=True),
    Attention(8, 16 << 10, 16, 1, latent=True),
    Attention(1, 128 << 10, 16, 1, latent=True),
    Attention(1, 128 << 10, 128, 1, latent=True),
]
#: Where attention that writes into the send buffer is measured beside attention and pack.
SENT = [Attention(8, 16 << 10, 8, 1), Attention(64, 16 << 10, 8, 1), Attention(64, 4 << 10, 16, 1)]


@dataclass(frozen=True)
class Inputs:
    """One set: query [B, Q, D], a paged cache in random order, its table, and the lengths."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.kv_cache, self.block_table, self.lengths


def inputs(case: Attention, page: int, memory: torch.Tensor | None = None, seed: int = 0) -> Inputs:
    """Random inputs whose cache has pages of `page` tokens. `memory` [elements], bf16, is reused if given."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    pages = -(-case.tokens // page)
    elements = case.batch * pages * page * case.token_bytes // 2
    if memory is None:
        memory = torch.randn(elements, dtype=torch.bfloat16, device="cuda", generator=generator)
    shape = (-1, page, 576) if case.latent else (-1, 2, page, case.kv_heads, case.head_dim)
    table = torch.randperm(case.batch * pages, device="cuda", generator=generator).to(torch.int32).view(case.batch, -1)
    return Inputs(
        torch.randn(case.batch, case.q_heads, case.width, dtype=torch.bfloat16, device="cuda", generator=generator),
        memory[:elements].view(shape),
        table,
        torch.full((case.batch,), case.tokens, dtype=torch.int32, device="cuda"),
    )


def exact_row(case: Attention, given: Inputs, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 (output [Q, Dv], lse [Q]) of one row."""
    count = int(given.lengths[row])
    blocks = given.kv_cache[given.block_table[row].long()]
    if case.latent:
        keys = blocks.flatten(0, 1)[:count, None]
        values = keys[..., :512]
    else:
        keys, values = (part.flatten(0, 1)[:count] for part in blocks.unbind(1))
    group = case.q_heads // case.kv_heads
    outputs, lses = [], []
    for head in range(case.kv_heads):
        query = given.query[row, head * group : (head + 1) * group].double()
        scores = torch.cat([query @ part.double().T for part in keys[:, head].split(1 << 17)], 1) * case.scale
        lses.append(scores.logsumexp(1))
        weights = scores.softmax(1)
        parts = zip(weights.split(1 << 17, 1), values[:, head].split(1 << 17), strict=True)
        outputs.append(sum(weight @ part.double() for weight, part in parts))
    return torch.cat(outputs), torch.cat(lses)
