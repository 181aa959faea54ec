"""The roofline: seconds of one decode step by term, and of a prefill, for whole grids of layouts at once.

Bandwidths, arithmetic and links are the data sheet's, divided by the calibration's efficiencies. Per layer (paper,
section 2 and appendix): attention reads `2 * ceil(K / TPA) * D * S / KVP` values a request (MLA: one latent), weights
are read once a step, and the exchange moves `B * Q / TP` heads to each KVP peer with one fp32 LSE a head.
"""

from dataclasses import dataclass

import numpy as np

from helix_runtime.planner.calibration import EAGER_LAUNCH, Calibration
from helix_runtime.planner.grid import A2A, AG_RS, Grid
from helix_runtime.planner.hardware import BYTES, LL_BYTES, Gpu
from helix_runtime.planner.weights import Weights, weights_of
from helix_runtime.shapes import ModelShape

TERMS = ("attention", "attention weights", "FFN weights", "gather", "exchange", "all-reduce", "launch")
#: The class of the calibration whose band a term has.
CLASS_OF = {
    "attention": "attention",
    "attention weights": "weights",
    "FFN weights": "weights",
    "gather": "all-gather",
    "exchange": "combine",
    "all-reduce": "all-reduce",
    "launch": "launch",
}
ACTIVATION = 2.0  # bytes: bf16
LSE = 4.0  # bytes: fp32
#: Kernels of one layer in decode: norms, projections, RoPE, cache write, attention, FFN; experts add routing. Those of
#: the exchange are measured with their launches.
KERNELS, KERNELS_MOE = 10, 14


@dataclass(frozen=True)
class Workload:
    """What is served: the shape, tokens of context, and dtypes of `hardware.BYTES`."""

    shape: ModelShape
    context: int
    weights: str = "bf16"
    kv: str = "bf16"


@dataclass(frozen=True)
class Cost:
    """Seconds of one decode step by term, and whether attention is bound by arithmetic; arrays as long as the grid."""

    terms: dict[str, np.ndarray]
    reads: np.ndarray  # attention without its kernels' overhead
    latent: bool
    attention_computes: np.ndarray
    weights_compute: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return sum(self.terms.values())

    def band(self, calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the total, every term at the edge of its own band."""
        kinds = CLASS_OF | ({"attention": "latent attention"} if self.latent else {})
        factor = {term: np.exp(calibration[kinds[term]].band) for term in TERMS}
        low = sum(seconds / factor[term] for term, seconds in self.terms.items())
        return low, sum(seconds * factor[term] for term, seconds in self.terms.items())


def decode(workload: Workload, gpu: Gpu, calibration: Calibration, grid: Grid, launches: bool = True) -> Cost:
    """One step for `grid.batch` requests of `workload.context` tokens. `launches` False leaves kernel launches out."""
    shape, weights = workload.shape, weights_of(workload.shape)
    batch = grid.batch / grid.stages  # one micro-batch in each stage
    layers = shape.num_layers
    attention, computes = _attention(workload, gpu, calibration, grid, batch)
    own = _matmul(attention_elements(weights, shape, grid), batch, workload, gpu, calibration)
    ffn, busy = _ffn(weights, batch, workload, gpu, calibration, grid)
    head = _matmul(weights.embedding / (grid.tpa * grid.kvp), batch, workload, gpu, calibration, "bf16")[0]
    gather, exchange = _collectives(shape, gpu, calibration, grid, batch)
    hidden = batch * shape.hidden_size * ACTIVATION
    # After o_proj, over the ranks that split it, and after the FFN, over those that split that; pipelines pass it on.
    reduce = _all_reduce(hidden, grid.output, gpu, calibration)
    reduce = reduce + _all_reduce(hidden, grid.ffn * grid.experts, gpu, calibration)
    between = np.where(grid.stages > 1, gpu.latency + hidden / gpu.link, 0) * (grid.stages - 1)
    launch = kernels(shape) * (calibration["launch"].predict(0.0) if launches else 0.0)
    # Stages work on different micro-batches at the same time, and a token passes through all of them.
    terms = {
        "attention": attention * layers,
        "attention weights": own[0] * layers,
        "FFN weights": ffn + head,
        "gather": gather * layers,
        "exchange": _exposed(exchange, attention, batch, grid) * layers,
        "all-reduce": reduce * layers + between,
        "launch": launch + np.zeros(len(grid)),
    }
    overhead = calibration["latent attention" if shape.use_mla else "attention"].predict(0.0)
    return Cost(terms, (attention - overhead) * layers, shape.use_mla, computes, busy)


def kernels(shape: ModelShape) -> int:
    """Kernels of one decode step."""
    return KERNELS * shape.num_layers + (KERNELS_MOE - KERNELS) * weights_of(shape).moe_layers


def eager(shape: ModelShape, calibration: Calibration) -> float:
    """Seconds that a step takes longer where the host launches every kernel, outside a CUDA graph."""
    return kernels(shape) * max(0.0, EAGER_LAUNCH - float(calibration["launch"].predict(0.0)))


def prefill(workload: Workload, gpu: Gpu, calibration: Calibration, grid: Grid, chunk: int = 8192) -> np.ndarray:
    """Seconds of the prompt pass of one request, in chunks of `chunk` tokens: bound by arithmetic and links."""
    shape, weights = workload.shape, weights_of(workload.shape)
    tokens, layers, ranks = workload.context, shape.num_layers, grid.tpa * grid.kvp
    rate = gpu.arithmetic(workload.weights) * calibration["weights"].efficiency
    linear = attention_elements(weights, shape, grid) * layers
    active = weights.dense_layers * weights.dense_ffn
    active += weights.moe_layers * (weights.shared + weights.per_token * weights.expert)
    linear = linear + active / (grid.ffn * grid.experts)
    seconds = 2 * linear * tokens / rate
    mla = shape.mla
    pair = (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim) if mla else 2 * shape.head_size
    arithmetic = gpu.arithmetic("bf16") * calibration["latent attention" if mla else "attention"].efficiency
    seconds = seconds + layers * pair * shape.num_query_heads / ranks * tokens**2 / arithmetic
    moved = tokens * shape.hidden_size * ACTIVATION
    seconds = seconds + 2 * layers * _all_reduce(moved, grid.output, gpu, calibration)
    shared = grid.kvp > 1
    peers = (grid.kvp - 1) / grid.kvp
    if mla:  # every chunk gathers the latent of the context before it
        context = mla.latent_size * ACTIVATION * tokens * np.maximum(1, tokens / chunk) / 2
        over = context * peers
    else:  # queries of a chunk go to every shard, partials come back
        heads = shape.num_query_heads / grid.tpa
        over = tokens * heads * (2 * shape.head_size * ACTIVATION + LSE) * peers
    rounds = np.ceil(tokens / chunk)
    wait = 2 * rounds * latency(grid.kvp, gpu, "all-gather")
    return seconds + np.where(shared, layers * (_moved(over, grid.kvp, gpu, calibration, "all-to-all") + wait), 0)


def attention_elements(weights: Weights, shape: ModelShape, grid: Grid) -> np.ndarray:
    """Weights of one layer's attention that one rank holds and reads."""
    heads = np.ceil(shape.num_kv_heads / grid.tpa)
    return (
        weights.query / grid.query
        + weights.kv_head * heads
        + weights.latent
        + (weights.value + weights.output) / grid.output
    )


def stored_bytes(workload: Workload, grid: Grid) -> np.ndarray:
    """Bytes of weights that one GPU holds. Embeddings stay in bf16, as quantised checkpoints keep them."""
    shape, weights = workload.shape, weights_of(workload.shape)
    moe = weights.router + (weights.shared + weights.routed * weights.expert) / (grid.ffn * grid.experts)
    ffn = weights.dense_layers * weights.dense_ffn / (grid.ffn * grid.experts) + weights.moe_layers * moe
    layers = attention_elements(weights, shape, grid) * shape.num_layers + ffn
    tables = (weights.embedding + weights.head) / (grid.tpa * grid.kvp) * BYTES["bf16"]
    return (layers * BYTES[workload.weights] + tables) / grid.stages


def cached_bytes(workload: Workload, grid: Grid) -> np.ndarray:
    """Bytes that one GPU caches for one token of its own shard of the sequence, over its layers."""
    shape = workload.shape
    values = shape.head_size if shape.use_mla else 2 * np.ceil(shape.num_kv_heads / grid.tpa) * shape.head_size
    return values * BYTES[workload.kv] * shape.num_layers / grid.stages + np.zeros(len(grid))


def hop_b(compute: float, communication: float, requests: int) -> tuple[float, float]:
    """Time of `requests` one after the other, and pipelined: the exchange of one beside the compute of the next."""
    serial = requests * (compute + communication)
    return serial, compute + (requests - 1) * max(compute, communication) + communication


def latency(ranks: np.ndarray, gpu: Gpu, kind: str, chunk: np.ndarray | float = 0.0) -> np.ndarray:
    """Seconds of a collective without those of its bytes, of which every peer gets `chunk`."""
    ranks, wait = np.asarray(ranks, float), gpu.wait(kind)
    within = (
        wait.latency + wait.per_doubling * np.log2(np.maximum(ranks, 1)) + np.where(chunk > LL_BYTES, wait.large, 0)
    )
    return np.where(ranks > 1, within + np.where(ranks > gpu.domain, gpu.network_latency, 0), 0)


def _attention(
    workload: Workload, gpu: Gpu, calibration: Calibration, grid: Grid, batch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    shape, tokens = workload.shape, batch * workload.context / grid.kvp
    memory = tokens * cached_bytes(workload, grid) / shape.num_layers * grid.stages / gpu.bandwidth
    pair = 2 * (shape.mla.latent_size + shape.mla.kv_lora_rank) if shape.mla else 4 * shape.head_size
    arithmetic = tokens * pair * shape.num_query_heads / grid.tpa / gpu.arithmetic(workload.kv)
    fit = calibration["latent attention" if shape.use_mla else "attention"]
    return fit.predict(np.maximum(memory, arithmetic)), arithmetic > memory


def _matmul(
    elements: np.ndarray | float,
    batch: np.ndarray,
    workload: Workload,
    gpu: Gpu,
    calibration: Calibration,
    dtype: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, bound by arithmetic) of reading `elements` weights once for `batch` tokens."""
    dtype = dtype or workload.weights
    memory = elements * BYTES[dtype] / gpu.bandwidth
    arithmetic = 2 * elements * batch / gpu.arithmetic(dtype)
    return np.maximum(memory, arithmetic) / calibration["weights"].efficiency, arithmetic > memory


def _ffn(
    weights: Weights, batch: np.ndarray, workload: Workload, gpu: Gpu, calibration: Calibration, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of all FFNs, and whether arithmetic bounds them. A batch wakes more experts than one token does."""
    shards = grid.ffn * grid.experts
    dense, busy = _matmul(weights.dense_ffn / shards, batch, workload, gpu, calibration)
    if not weights.moe_layers:
        return dense * weights.dense_layers, busy
    awake = weights.routed * (1 - (1 - weights.per_token / weights.routed) ** batch)
    # Whole experts spread over groups by chance: the fullest group holds about this many of the awake ones.
    mean = awake / grid.experts
    spread = np.sqrt(2 * mean * np.log(np.maximum(grid.experts, 1)))
    fullest = np.minimum(np.where(grid.experts > 1, np.maximum(1, mean + spread), mean), weights.routed / grid.experts)
    fullest = np.minimum(fullest, awake)
    fixed = _matmul(weights.router + weights.shared / shards, batch, workload, gpu, calibration)[0]
    memory = fullest * weights.expert / grid.ffn * BYTES[workload.weights] / gpu.bandwidth
    share = np.where(mean > 0, fullest / np.maximum(mean, 1e-9), 1)
    tokens = batch * weights.per_token / grid.experts * share
    arithmetic = 2 * weights.expert / grid.ffn * tokens / gpu.arithmetic(workload.weights)
    routed = np.maximum(memory, arithmetic) / calibration["weights"].efficiency
    return dense * weights.dense_layers + (fixed + routed) * weights.moe_layers, arithmetic > memory


def _collectives(
    shape: ModelShape, gpu: Gpu, calibration: Calibration, grid: Grid, batch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(query gather, exchange) of one layer. MLA gathers latent queries and exchanges latent partials."""
    mla, ranks = shape.mla, grid.tpa * grid.kvp
    query = mla.latent_size if mla else shape.head_size
    partial = mla.kv_lora_rank if mla else shape.head_size
    owned, peers = batch * shape.num_query_heads / ranks, grid.kvp - 1
    gather = _moved(peers * owned * query * ACTIVATION, grid.kvp, gpu, calibration, "all-gather")
    gather = np.where(grid.gathers, gather + latency(grid.kvp, gpu, "all-gather"), 0)
    row = partial * ACTIVATION + LSE
    moved = _moved(peers * owned * row, grid.kvp, gpu, calibration, "all-to-all")
    once, twice = latency(grid.kvp, gpu, "all-to-all", owned * row), 2 * latency(grid.kvp, gpu, "all-gather")
    waits = np.where(grid.merge == AG_RS, twice, once)
    # Pack reads and writes every partial; combine reads them and writes one.
    one = owned * row / gpu.bandwidth
    kernels = calibration["pack"].predict(2 * grid.kvp * one, grid.kvp)
    kernels = kernels + calibration["combine"].predict((grid.kvp + 1) * one, grid.kvp)
    return gather, np.where(grid.merge > 0, moved + waits + kernels, 0)


def _exposed(exchange: np.ndarray, attention: np.ndarray, batch: np.ndarray, grid: Grid) -> np.ndarray:
    """What of the exchange is waited for. With HOP-B all but one request's share can hide behind attention."""
    requests = np.maximum(batch, 1)
    one, other = attention / requests, exchange / requests
    pipelined = one + (requests - 1) * np.maximum(one, other) + other - attention
    hides = grid.overlap & (grid.merge == A2A)
    return np.where(hides, np.minimum(exchange, pipelined), exchange)


def _all_reduce(nbytes: np.ndarray | float, ranks: np.ndarray, gpu: Gpu, calibration: Calibration) -> np.ndarray:
    """Latency, and twice the message over the slower of link and, beyond a domain, each GPU's share of the network."""
    inside = 2 * nbytes * (1 - 1 / np.maximum(ranks, 1)) / gpu.link
    outside = np.where(ranks > gpu.domain, 2 * nbytes / gpu.domain / gpu.network, 0)
    moved = (inside + outside) / calibration["all-reduce"].efficiency
    return np.where(ranks > 1, moved + latency(ranks, gpu, "all-reduce"), 0)


def _moved(nbytes: np.ndarray, ranks: np.ndarray, gpu: Gpu, calibration: Calibration, kind: str) -> np.ndarray:
    """Seconds to send `nbytes` evenly to the peers of a group; what leaves the domain takes the network."""
    outside = np.where(ranks > gpu.domain, (ranks - gpu.domain) / np.maximum(ranks - 1, 1), 0)
    seconds = nbytes * (1 - outside) / gpu.link + nbytes * outside / gpu.network
    return seconds / calibration[kind].efficiency
