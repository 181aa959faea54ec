"""One rank's share of one decode layer: which GEMMs, which attention, which exchanges, for a model and a layout."""

from dataclasses import dataclass

from benchmarks.attention_cases import Attention
from helix_runtime.shapes import ModelShape


@dataclass(frozen=True)
class Gemm:
    """`batch` products [tokens, k] x [k, n], bf16 weights read once; `batch` > 1 for heads or experts."""

    name: str
    tokens: int
    k: int
    n: int
    batch: int = 1

    @property
    def bytes(self) -> int:
        return 2 * self.batch * (self.k * self.n + self.tokens * (self.k + self.n))

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.tokens * self.k * self.n


@dataclass(frozen=True)
class Transfer:
    """Bytes that one rank sends its `ranks` - 1 peers in one collective (`kind`), by the link model."""

    kind: str
    ranks: int
    bytes: int


@dataclass(frozen=True)
class Layout:
    """N GPUs: KVP ranks share a sequence's KV cache, TPA = N / KVP shard the heads.

    standard-tp: every rank its KV heads, repeated where there are fewer than ranks. standard-dcp: stock vLLM's: KV
    heads as standard TP, the copies' tokens dealt out; queries gathered over KVP, attention on all the group's heads.
    helix: TPA chosen freely, queries of the group computed on each of its ranks.
    """

    mode: str
    gpus: int
    kvp: int = 1

    @property
    def tpa(self) -> int:
        return self.gpus // self.kvp

    @property
    def name(self) -> str:
        return f"{self.mode} TP{self.gpus}" + (f" KVP{self.kvp}" if self.kvp > 1 else "")


@dataclass(frozen=True)
class Step:
    """What one rank runs in one layer. `exchange` is (partials N, tokens, heads each, head size) or None."""

    gemms: tuple[Gemm, ...]
    attention: Attention
    exchange: tuple[int, int, int, int] | None
    transfers: tuple[Transfer, ...]


def step_of(model: ModelShape, layout: Layout, batch: int, context: int) -> Step:
    """One rank's share of one layer; for a MoE model of a layer with experts."""
    local = context // layout.kvp
    attention, projections, exchange, transfers = (_latent if model.use_mla else _grouped)(model, layout, batch, local)
    hidden, gpus = model.hidden_size, layout.gpus
    reduce = Transfer("all-reduce", gpus, 2 * batch * hidden)
    return Step(
        (*projections, *_ffn(model, gpus, batch)), attention, exchange, (*transfers, reduce, reduce) if gpus > 1 else ()
    )


def _grouped(model: ModelShape, layout: Layout, batch: int, local: int):
    gpus, kvp, size, hidden = layout.gpus, layout.kvp, model.head_size, model.hidden_size
    query_heads, transfers = model.num_query_heads, []
    # Standard DCP splits heads as standard TP, and gathers queries; Helix computes the group's on each of its ranks.
    computed = query_heads // (layout.tpa if layout.mode == "helix" else gpus)
    kv_heads = max(1, model.num_kv_heads // (layout.tpa if layout.mode == "helix" else gpus))
    attended = computed * kvp if layout.mode == "standard-dcp" else computed
    if layout.mode == "standard-dcp":
        transfers.append(Transfer("all-gather", kvp, 2 * batch * computed * size))
    owned = query_heads // gpus
    exchange = None
    if kvp > 1:
        exchange = (kvp, batch, owned, size)
        transfers.append(Transfer("all-to-all", kvp, batch * owned * (2 * size + 4) * (kvp - 1)))
    projections = (
        Gemm("qkv", batch, hidden, (computed + 2 * kv_heads) * size),
        Gemm("o_proj", batch, owned * size, hidden),
    )
    return Attention(batch, local, attended, kv_heads, size), projections, exchange, tuple(transfers)


def _latent(model: ModelShape, layout: Layout, batch: int, local: int):
    mla, gpus, kvp, hidden = model.mla, layout.gpus, layout.kvp, model.hidden_size
    helix = layout.mode == "helix"
    heads = model.num_query_heads // (layout.tpa if helix else gpus)  # whose queries are projected here
    owned = model.num_query_heads // gpus
    query_size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    transfers, exchange = [], None
    if layout.mode == "standard-dcp":
        transfers.append(Transfer("all-gather", kvp, 2 * batch * heads * mla.latent_size))
    attended = heads * kvp if layout.mode == "standard-dcp" else heads
    if kvp > 1:
        exchange = (kvp, batch, owned, mla.kv_lora_rank)
        transfers.append(Transfer("all-to-all", kvp, batch * owned * (2 * mla.kv_lora_rank + 4) * (kvp - 1)))
    projections = (
        Gemm("q_a and kv_a", batch, hidden, mla.q_lora_rank + mla.latent_size),
        Gemm("q_b", batch, mla.q_lora_rank, heads * query_size),
        Gemm("absorb W_UK", batch, mla.qk_nope_head_dim, mla.kv_lora_rank, heads),
        Gemm("absorb W_UV", batch, mla.kv_lora_rank, mla.v_head_dim, owned),
        Gemm("o_proj", batch, owned * mla.v_head_dim, hidden),
    )
    return Attention(batch, local, attended, 1, latent=True), projections, exchange, tuple(transfers)


def _ffn(model: ModelShape, gpus: int, batch: int) -> tuple[Gemm, ...]:
    hidden = model.hidden_size
    if model.moe is None:
        width = model.intermediate_size // gpus
        return Gemm("gate and up", batch, hidden, 2 * width), Gemm("down", batch, width, hidden)
    # Expert parallel: whole experts on each rank. Of those here, the ones that some token of the batch picks are read.
    moe = model.moe
    here = moe.routed // gpus
    touched = max(1, round(here * (1 - (1 - moe.per_token / moe.routed) ** batch)))
    each = max(1, round(batch * moe.per_token / moe.routed * here / touched))
    width, shared = moe.intermediate_size, moe.shared * moe.intermediate_size // gpus
    return (
        Gemm("experts up", each, hidden, 2 * width, touched),
        Gemm("experts down", each, width, hidden, touched),
        Gemm("shared up", batch, hidden, 2 * shared),
        Gemm("shared down", batch, shared, hidden),
    )


def weight_bytes(model: ModelShape, layout: Layout) -> int:
    """Bytes of bf16 weights that one rank holds, embeddings and head sharded over all ranks."""
    step = step_of(model, layout, 1, 1 << 20)
    per_layer = sum(2 * g.k * g.n * g.batch for g in step.gemms if not g.name.startswith("experts"))
    if model.moe is not None:
        experts = model.moe.routed // layout.gpus
        per_layer += experts * 2 * 3 * model.hidden_size * model.moe.intermediate_size
    return per_layer * model.num_layers + 2 * 2 * model.vocab_size * model.hidden_size // layout.gpus


def token_bytes(model: ModelShape, layout: Layout) -> float:
    """Bytes of bf16 KV cache that one token of context takes on one rank, over all layers."""
    attention = step_of(model, layout, 1, layout.kvp << 10).attention
    return attention.token_bytes * model.num_layers / layout.kvp
